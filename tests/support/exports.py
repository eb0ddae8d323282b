"""Exports, and the models that they are compared with: tensor for tensor, config key for key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

import verl_autoexport
from verl_autoexport.export.pipeline import export_checkpoint


def export(checkpoint: Path, output: Path, **options: Any) -> verl_autoexport.ExportRecord:
    return export_checkpoint(checkpoint, output, **{"verify": False, "workers": 1} | options)


def oracle(reference: Path, dtype: str, output: Path) -> Path:
    """What transformers makes of the unsharded model in `dtype`."""
    if dtype == "source":
        return reference
    (name,) = json.loads((reference / "config.json").read_text())["architectures"]
    getattr(transformers, name).from_pretrained(reference, dtype=getattr(torch, dtype)).save_pretrained(output)
    return output


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            names = f.keys()
            assert not found.keys() & set(names)
            found |= {name: f.get_tensor(name) for name in names}
    return found


def assert_same_model(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (name, ours[name].dtype, ours[name].shape) == (name, tensor.dtype, tensor.shape)
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    for file in ("config.json", "generation_config.json"):
        if (expected / file).exists():
            assert json.loads((found / file).read_text()) == json.loads((expected / file).read_text())


def auto(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")

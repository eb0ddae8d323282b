"""Steps whose weights verl wrote as Hugging Face files, made of transformers' own `save_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAYOUTS = {
    "fsdp, or megatron up to 0.8": "actor/huggingface",
    "policy": "policy/huggingface",
    "megatron from 0.9": "actor/model/huggingface",
    "sft": "huggingface",
    "sft with megatron": "model/huggingface",
}
"""Who saves → where the weights are in a step."""
FSDP, MEGATRON = LAYOUTS["fsdp, or megatron up to 0.8"], LAYOUTS["megatron from 0.9"]


def contents(**backend: bool) -> dict[str, Any]:
    """`ckpt_contents.json` as verl 0.9.1 writes it, as far as it is read; `peft` is a key of its backend."""
    where = {"path": "model/huggingface", "format": "huggingface"}
    return {
        "schema_version": 2,
        "framework": "megatron",
        "backend": {"has_bridge": True, "use_dist_checkpointing": False, "peft": False} | backend,
        "contents": {"model": where | {"backend": "mbridge"}, "hf_config": where},
    }


def save(model: Any, step: Path, where: str = FSDP, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Saves `model` into a step and returns its `huggingface/`; `config` overrides keys of its config.json."""
    folder = step / where
    model.save_pretrained(folder, **options)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if folder.parent.name == "model":
        (folder.parent.parent / "ckpt_contents.json").write_text(json.dumps(contents()))
    return folder

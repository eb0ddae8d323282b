"""Base models on disk, and ways to make them other than the run expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.sharding import QWEN2, build


def make_base(path: Path, config: dict[str, Any] = QWEN2, dtype: str = "bfloat16", **options: Any) -> Path:
    build(config, dtype).save_pretrained(path, **options)
    return path


def edit_tensors(base: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = load_file(base / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, base / "model.safetensors", {"format": "pt"})
    return base


def edit_config(base: Path, drop: tuple[str, ...] = (), **values: Any) -> dict[str, Any]:
    path = base / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | values
    path.write_text(json.dumps(config))
    return config


def contract(record: Any) -> dict[str, Any]:
    return dict(record.verification["contract"])


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())

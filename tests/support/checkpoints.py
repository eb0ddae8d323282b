"""Checkpoints on disk, and ways to damage them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEP = 7
CHECKED = {
    "structure": "passed", "contract": "skipped", "assets": "skipped", "load": "passed", "generate": "passed",
    "logits": "passed",
}  # fmt: skip
"""Status of each check of an export without a base model; the checkpoints have no tokenizer to compare."""
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def rank_file(checkpoint: Path, rank: int) -> Path:
    (path,) = (checkpoint / "actor").glob(f"model_world_size_*_rank_{rank}.pt")
    return path


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any], ranks: tuple[int, ...] = (0, 1)) -> Path:
    """Save the shards of `ranks` again, changed."""
    for rank in ranks:
        shards = torch.load(rank_file(checkpoint, rank), weights_only=False)
        change(shards)
        torch.save(shards, rank_file(checkpoint, rank))
    return checkpoint


def edit_config(checkpoint: Path, **values: Any) -> Path:
    path = checkpoint / "actor/huggingface/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return checkpoint


def truncate(path: Path, nbytes: int | None = None) -> None:
    os.truncate(path, path.stat().st_size // 2 if nbytes is None else nbytes)

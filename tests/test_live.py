"""The live source: copies of sharded modules against the checkpoints of the same weights."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharding import QWEN2, QWEN3_MOE, make_checkpoints

from verl_autoexport.export.reader import ShardReader
from verl_autoexport.sources.base import ShardManifest
from verl_autoexport.sources.fsdp_files import FsdpFiles
from verl_autoexport.sources.live import flat_boxes, make_manifest

TIED = QWEN2 | {"tie_word_embeddings": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CASES = {
    3: {
        "fsdp2": {"config": QWEN2, "live": "float32"},
        "fsdp2_bf16": {"config": QWEN3_MOE, "live": "bfloat16"},
        "fsdp1": {"config": QWEN2, "strategy": "fsdp", "live": "float32"},
        "fsdp1_tied": {"config": TIED, "strategy": "fsdp", "live": "bfloat16"},
        "fsdp1_moe": {"config": QWEN3_MOE, "strategy": "fsdp", "live": "bfloat16"},
        "fsdp1_lora": {"config": QWEN2, "strategy": "fsdp", "lora": LORA, "live": "float32"},
        "fsdp2_lora": {"config": QWEN2, "lora": LORA, "live": "float32"},
        "tied": {"config": TIED, "live": "float16"},
    },
    4: {
        "hsdp": {"config": QWEN2, "mesh": (2, 2), "live": "bfloat16"},
        "hsdp1": {"config": QWEN2, "mesh": (2, 2), "strategy": "fsdp", "live": "bfloat16"},
    },
    1: {"alone": {"config": QWEN2, "live": "bfloat16"}},
}
NAMES = [(name, case["live"]) for cases in CASES.values() for name, case in cases.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("live")
    for world, cases in CASES.items():
        make_checkpoints({folder / name: case | {"reference": False} for name, case in cases.items()}, world)
    return lambda name: folder / name


def read(folder: Path) -> ShardManifest:
    layouts = [pickle.loads(p.read_bytes()) for p in sorted(folder.glob("*.layout"))]
    files = [[folder / f"{layout.rank}-{i}.bin" for i in range(len(layout.chunks))] for layout in layouts]
    return make_manifest(layouts, files, "fsdp2", "x")


@pytest.mark.parametrize(("name", "dtype"), NAMES)
def test_equals_the_checkpoint(name, dtype, made):
    saved, live = FsdpFiles(made(name) / "actor").manifest(), read(made(name) / "live")
    aliases = {"lm_head.weight"} if "tied" in name else set()
    assert saved.tensors.keys() - aliases == live.tensors.keys()
    with ShardReader(saved) as theirs, ShardReader(live) as ours:
        for fqn in live.tensors:
            expected = theirs.whole(fqn).to(getattr(torch, dtype))
            assert torch.equal(ours.whole(fqn), expected), fqn


def test_one_replica_group_does_the_work(made):
    for name in ("hsdp", "hsdp1"):
        ranks = {s.rank for t in read(made(name) / "live").tensors.values() for s in t.shards}
        assert ranks == {0, 1}


def test_chunks_are_bounded_and_full(made):
    layout = pickle.loads((made("fsdp1") / "live/0.layout").read_bytes())
    assert max(layout.chunks) <= 1 << 14
    assert sum(layout.chunks) > (len(layout.chunks) - 1) << 13
    assert max(Counter(part.fqn for part in layout.parts).values()) > 1  # larger tensors are cut


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_flat_boxes_are_the_range(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = torch.arange(numel).reshape(shape)
    parts = [
        numbers[tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))].reshape(-1)
        for offsets, extent in flat_boxes(shape, start, stop)
    ]
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    assert torch.cat(parts).tolist() == list(range(start, stop)) if parts else start == stop

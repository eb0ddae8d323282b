"""Parts of the live source that need no worker: the layout of a copy, and deliveries."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_autoexport.sources.live import snapshot
from verl_autoexport.sources.live.copier import Part, flat_boxes, lay_out
from verl_autoexport.sources.live.snapshot import Deliveries


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=12))
def test_no_chunk_has_tensors_of_two_files(tensors):
    parts = [Part(str(i), "float32", (size,), (((0,), (size,)),)) for i, (size, _) in enumerate(tensors)]
    groups = {str(i): group for i, (_, group) in enumerate(tensors)}
    layout = lay_out(0, parts, {}, 256, groups)
    found = [{groups[p.fqn] for p in layout.parts if p.chunk == i} for i in range(len(layout.chunks))]
    assert all(len(g) == 1 for g in found)
    assert [min(g) for g in found] == sorted(min(g) for g in found)
    assert all(0 < n <= 256 for n in layout.chunks)
    assert sorted((p.fqn, p.numel) for p in parts) == sorted(
        (fqn, sum(p.numel for p in layout.parts if p.fqn == fqn)) for fqn in groups
    )


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


def test_a_snapshot_whose_export_nobody_asks_for_is_let_go_of(monkeypatch):
    deliveries = Deliveries()
    assert deliveries.take("x", 0, [])
    deliveries.ask("asked")
    assert deliveries.take("asked", 0, [])
    monkeypatch.setattr(snapshot, "_UNASKED_S", -1.0)
    assert not deliveries.take("x", 0, [])
    assert deliveries.blocks.keys() == {"asked"}
    assert deliveries.take("asked", 0, [])

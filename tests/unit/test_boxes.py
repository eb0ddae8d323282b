"""Boxes of tensors: cut in order for reading, and placed on a device mesh as torch places them."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from verl_autoexport.merge.reader import boxes
from verl_autoexport.sources.fsdp.rank_files import local_box

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 400))
def test_boxes_tile_in_order(shape, limit):
    """Laid end to end, the boxes are the tensor's memory: they are contiguous, in order and complete."""
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    parts = []
    for offsets, extent in boxes(shape, limit):
        part = numbers[tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))]
        assert 0 < part.numel() <= limit
        assert part.shape == extent
        parts.append(part.reshape(-1))
    assert torch.equal(torch.cat(parts) if parts else numbers.reshape(-1), numbers.reshape(-1))


@given(
    st.data(), st.lists(st.integers(1, 11), min_size=1, max_size=3).map(tuple), st.sampled_from([(3,), (2, 3), (4, 2)])
)
@settings(deadline=None)
def test_local_box_is_torchs(data, shape, mesh_shape):
    mesh = torch.arange(math.prod(mesh_shape)).reshape(mesh_shape)
    placement = st.sampled_from([Replicate(), *map(Shard, range(len(shape)))])
    placements = [data.draw(placement) for _ in mesh_shape]
    rank = data.draw(st.integers(0, mesh.numel() - 1))
    coordinate = [int(i[0]) for i in torch.where(mesh == rank)]
    local, offsets = local_box("w", shape, mesh, placements, rank)
    theirs, their_offsets = _compute_local_shape_and_global_offset(shape, mesh_shape, coordinate, placements)
    assert local == tuple(theirs)
    if math.prod(local):  # the offset of nothing means nothing
        assert offsets == tuple(their_offsets)


@given(st.integers(1, 40), st.integers(1, 9))
def test_local_box_splits_like_chunk(size, world_size):
    mesh = torch.arange(world_size)
    found = [local_box("w", (size,), mesh, [Shard(0)], rank)[0][0] for rank in range(world_size)]
    expected = [len(c) for c in torch.arange(size).chunk(world_size)]
    assert found == expected + [0] * (world_size - len(expected))

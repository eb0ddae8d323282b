"""The plan of bytes: exact coverage, symbolic runs of ranks, refusals, against references written another way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_autoexport.errors import PlanError, SourceError
from verl_autoexport.merge.plan import Output, Piece, make_plan, whole
from verl_autoexport.shards.manifest import Shard, ShardManifest, TensorEntry, check_coverage, join_runs
from verl_autoexport.shards.tiling import find_flaw

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def counts(boxes, shape) -> torch.Tensor:
    """How often each element is in a box; a box that leaves the shape counts nowhere."""
    found = torch.zeros(shape, dtype=torch.int64)
    for offsets, extent in boxes:
        found[tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))] += 1
    return found


@given(shapes, st.data())
def test_boxes_tile_a_shape_or_not(shape, data):
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 4))):  # cut one in two
        offsets, extent = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        d = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, extent[d]))
        boxes.append((offsets, (*extent[:d], at, *extent[d + 1 :])))
        boxes.append(
            ((*offsets[:d], offsets[d] + at, *offsets[d + 1 :]), (*extent[:d], extent[d] - at, *extent[d + 1 :]))
        )
    for _ in range(
        data.draw(st.integers(0, min(2, len(boxes))))
    ):  # and put something in a wrong place, or leave it away
        offsets, extent = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        if data.draw(st.booleans()):
            boxes.append((tuple(data.draw(st.integers(0, n - m)) for n, m in zip(shape, extent, strict=True)), extent))
    expected = bool((counts(boxes, shape) == 1).all())
    assert (find_flaw(boxes, shape) is None) == expected


def test_what_lies_outside_is_told():
    for box in (((-1,), (2,)), ((3,), (2,)), ((0,), (-4,)), ((0, 0), (4, 1))):
        assert find_flaw([box], (4,)).kind == "outside"


def shard(rank: int, offsets, shape, byte_offset: int = 64) -> Shard:
    return Shard(rank, tuple(offsets), tuple(shape), rank, byte_offset)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2), st.integers(1, 3), st.data())
def test_runs_stand_for_the_same_shards(size, world, dim, stride, data):
    shape = [3, 3, 3]
    shape[dim] = size
    step, single = math.ceil(size / world), []
    for i in range(world):
        begin = min(i * step, size)
        local = [*shape[:dim], min(step, size - begin), *shape[dim + 1 :]]
        offset = data.draw(st.sampled_from([64, 64, 64, 128]))
        single.append(shard(i * stride, [begin if d == dim else 0 for d in range(3)], local, offset))
    single = [s for s in single if math.prod(s.shape)]
    runs = join_runs(single)
    assert [run.number(i) for run in runs for i in range(run.count)] == single
    check_coverage(TensorEntry("w", "float32", tuple(shape), runs))
    lo = [data.draw(st.integers(0, n - 1)) for n in shape]
    extent = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, lo, strict=True)]
    cuts = [(run, cut) for run in runs for cut in run.cuts(tuple(lo), tuple(extent))]
    overlap = [
        s for s in single
        if all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(lo, extent, s.offsets, s.shape, strict=True))
    ]  # fmt: skip
    assert [run.number(cut.first + i) for run, cut in cuts for i in range(cut.count)] == overlap


def test_an_even_layout_is_one_run_however_many_ranks():
    ranks = [shard(r, (r * 4, 0), (4, 8)) for r in range(1000)]
    (run,) = join_runs(ranks)
    assert (run.count, run.extent) == (1000, (4000, 8))
    with pytest.raises(SourceError, match=r"w: the local shapes do not add up .* expected 32000 elements, found 31968"):
        check_coverage(TensorEntry("w", "float32", (4000, 8), join_runs(ranks[:-1])))
    with pytest.raises(SourceError, match="ranks 0 to 998 and rank 7 hold overlapping parts"):
        check_coverage(TensorEntry("w", "float32", (4000, 8), (*join_runs(ranks[:-1]), ranks[7])))


MANIFEST = ShardManifest((), {
    "a": TensorEntry("a", "float32", (4, 6), (shard(0, (0, 0), (4, 6)),)),
    "b": TensorEntry("b", "float32", (2, 6), (shard(0, (0, 0), (2, 6)),)),
}, 1, "fsdp2", "")  # fmt: skip


def joined(*ats: int) -> Output:
    """Both halves of `a` in one output, put at these rows."""
    pieces = tuple(Piece("a", (2 * i, 0), (2, 6), (0, 1), (at, 0)) for i, at in enumerate(ats))
    return Output("x", (4, 6), "bfloat16", pieces)


def test_every_element_comes_from_one_place_and_goes_to_one_place():
    plan = make_plan(MANIFEST, [joined(2, 0), Output("b", (2, 6), "float32", whole("b", (2, 6)))], 10**9)
    assert [o.name for o in plan.files[0].outputs] == ["b", "x"]  # the wider first
    assert plan.nbytes == len(plan.files[0].header) + 4 * 6 * 2 + 2 * 6 * 4
    with pytest.raises(PlanError, match=r"x \[4, 6\]: \[2, 6\] at \[0, 0\] and \[2, 6\] at \[0, 0\] overlap"):
        make_plan(MANIFEST, [joined(0, 0)], 10**9)
    twice = replace(joined(0, 2), pieces=tuple(replace(p, offsets=(0, 0)) for p in joined(0, 2).pieces))
    with pytest.raises(PlanError, match=r"a: \[4, 6\] in the shards, but for the output .* overlap"):
        make_plan(MANIFEST, [twice], 10**9)
    with pytest.raises(PlanError, match=r"x \[4, 6\]: 12 elements are planned"):
        make_plan(MANIFEST, [joined(0)], 10**9)
    reshaped = Output("x", (6, 4), "float32", (Piece("b", (0, 0), (2, 6), None, (0, 0)),))
    with pytest.raises(PlanError, match=r"x: \[2, 6\] cannot be reshaped to \[6, 4\]"):
        make_plan(MANIFEST, [reshaped], 10**9)

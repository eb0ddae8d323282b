"""A check that boxes fill a tensor exactly; standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Index = tuple[int, ...]
Box = tuple[Index, Index]
"""Offsets and shape, in elements, per dimension."""


def overlap(offsets: Index, shape: Index, others: Index, extent: Index) -> tuple[Index, Index]:
    """(offsets, shape) of the common part of two boxes, in the coordinates of both; an empty one has a 0 in shape."""
    lo = tuple(max(a, b) for a, b in zip(offsets, others, strict=True))
    hi = (min(a + n, b + m) for a, n, b, m in zip(offsets, shape, others, extent, strict=True))
    return lo, tuple(max(0, h - low) for low, h in zip(lo, hi, strict=True))


@dataclass(frozen=True)
class Flaw:
    """The reason why boxes do not tile a shape: `kind` is `outside`, `volume` or `overlap`.

    `boxes` are the numbers of those to blame; `found` is the sum of their elements for `volume`.
    """

    kind: str
    boxes: tuple[int, ...] = ()
    found: int = 0


def find_flaw(boxes: Sequence[Box], shape: Index) -> Flaw | None:
    """The first flaw found; None if every element of `shape` is in exactly one box.

    Boxes that lie inside, do not overlap and together have as many elements as `shape` leave no gap.
    """
    if len(boxes) == 1 and boxes[0][1] == shape and not any(boxes[0][0]):
        return None
    volume = 0
    for number, (offsets, extent) in enumerate(boxes):
        if len(offsets) != len(shape) or len(extent) != len(shape):
            return Flaw("outside", (number,))
        for offset, size, limit in zip(offsets, extent, shape, strict=True):
            if offset < 0 or size < 0 or offset + size > limit:
                return Flaw("outside", (number,))
        volume += math.prod(extent)
    if volume != math.prod(shape):
        return Flaw("volume", found=volume)
    pair = _overlapping(boxes, len(shape))
    return None if pair is None else Flaw("overlap", pair)


def _overlapping(boxes: Sequence[Box], ndim: int) -> tuple[int, int] | None:
    """Two boxes that share an element, found by a sweep along the dimension with the most different starts."""
    solid = [i for i, (_, extent) in enumerate(boxes) if math.prod(extent)]
    if len(solid) < 2 or not ndim:
        return (solid[0], solid[1]) if len(solid) > 1 else None
    axis = max(range(ndim), key=lambda d: len({boxes[i][0][d] for i in solid}))
    solid.sort(key=lambda i: boxes[i][0][axis])
    for place, a in enumerate(solid):
        offsets, extent = boxes[a]
        end = offsets[axis] + extent[axis]
        for b in solid[place + 1 :]:
            others, size = boxes[b]
            if others[axis] >= end:
                break  # sorted: nothing further can overlap `a`
            if all(x < y + m and y < x + n for x, n, y, m in zip(offsets, extent, others, size, strict=True)):
                return a, b
    return None

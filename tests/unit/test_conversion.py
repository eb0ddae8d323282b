"""What a conversion makes of tensors is read off right, or refused: never misread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pieces import put_together
from verl_autoexport.errors import PlanError
from verl_autoexport.model.trace import trace

Tensors = dict[str, torch.Tensor]


def metas(sources: Tensors) -> Tensors:
    return {k: v.to("meta") for k, v in sources.items()}


def numbers(*shapes: tuple[int, ...]) -> Tensors:
    """Tensors `0`, `1` … of which no two values are equal."""
    values = torch.arange(1000 * len(shapes)).chunk(len(shapes))
    return {str(i): v[: torch.Size(s).numel()].reshape(s) for i, (v, s) in enumerate(zip(values, shapes, strict=True))}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone().mul_(2),
        lambda t: t.mul_(2),
        lambda t: t[:, 1:].fill_(0),
        lambda t: t.clone().copy_(t.flip(0)),
        lambda t: torch.neg(t, out=t),
        lambda t: torch._neg_view(t),
        lambda t: t * 2,
        lambda t: t.flip(0),
        lambda t: t[:, ::2],
        lambda t: t.expand(2, 4, 6),
        lambda t: torch.cat([t, t]).add_(1),
    ],
)
def test_changed_values_are_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(PlanError, match=r"out: transformers makes it .* in a way that cannot be followed"):
        trace(lambda tensors: {"out": change(tensors["0"])}, metas(numbers((4, 6))))


def _steps(data: Any, tensors: list[torch.Tensor]) -> list[Callable[[list[torch.Tensor]], list[torch.Tensor]]]:
    """A few random rearrangements, such as conversions are made of; each takes all tensors and gives others."""
    steps = []
    for _ in range(data.draw(st.integers(1, 5))):
        i = data.draw(st.integers(0, len(tensors) - 1))
        one = tensors[i]
        dims = st.integers(0, max(one.ndim - 1, 0))
        kinds = ["contiguous", "squeeze", "flatten", "unsqueeze", "halve"]
        kinds += ["transpose", "chunk", "chunk", "narrow", "unbind", "unbind"] if one.ndim else []
        alike = [t for t in tensors if t.shape == one.shape]
        kinds += 6 * (["stack"] + (["cat"] if one.ndim else [])) if len(alike) > 1 else []
        kind, a, b = data.draw(st.sampled_from(kinds)), data.draw(dims), data.draw(dims)
        steps.append(lambda ts, i=i, kind=kind, a=a, b=b: _step(ts, i, kind, a, b))
        tensors = steps[-1](tensors)
    return steps


def _step(tensors: list[torch.Tensor], i: int, kind: str, a: int, b: int) -> list[torch.Tensor]:
    one = tensors[i]
    alike = [t for t in tensors if t.shape == one.shape]
    others = [t for k, t in enumerate(tensors) if k != i]
    if kind in ("stack", "cat"):
        return [t for t in tensors if t.shape != one.shape] + [getattr(torch, kind)(alike, a)]
    made = {
        "contiguous": lambda: [one.contiguous()],
        "squeeze": lambda: [one.squeeze()],
        "flatten": lambda: [one.flatten()],
        "unsqueeze": lambda: [one.unsqueeze(a)],
        "halve": lambda: [one.reshape(2, -1) if one.numel() % 2 == 0 else one],
        "transpose": lambda: [one.transpose(a, b).contiguous()],
        "chunk": lambda: list(one.chunk(2, a)),
        "narrow": lambda: [one.narrow(a, one.shape[a] // 2, one.shape[a] - one.shape[a] // 2)],
        "unbind": lambda: list(one.unbind(a)),
    }
    return others + made[kind]()


@given(st.data(), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_rearrangements_are_followed_or_refused(data: Any, shapes: list[tuple[int, ...]]) -> None:
    sources = numbers(*shapes)
    steps = _steps(data, list(sources.values()))

    def convert(tensors: Tensors) -> Tensors:
        found = list(tensors.values())
        for step in steps:
            found = step(found)
        return {str(i): t for i, t in enumerate(found)}

    expected = convert(sources)
    try:
        outputs = trace(convert, metas(sources))
    except (PlanError, RuntimeError):  # a copy that became an alias may not be viewed in another shape
        return
    assert [o.name for o in outputs] == list(expected)
    for output in outputs:
        assert torch.equal(put_together(output, sources), expected[output.name])

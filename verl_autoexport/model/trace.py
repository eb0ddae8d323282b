"""The sources of each tensor on disk, read off transformers' own conversion as it runs on meta tensors.

A view keeps the storage, strides and offset of its source, on the meta device too. So the
conversion runs once, without data, and its results show which boxes of which source tensors
they are. During the run, copies become aliases and joins are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import Output, Piece, whole

Tensors = Mapping[str, torch.Tensor]
_aten = torch.ops.aten


def trace(convert: Callable[[Tensors], Tensors], sources: Tensors) -> list[Output]:
    """Runs `convert` on `sources` (contiguous meta tensors by name) and describes the pieces of its results.

    Raises PlanError if a result is more than a rearrangement of its sources' values.
    """
    ops = _Ops()
    with ops, torch.no_grad():
        made = convert(sources)
    known = {_storage(t): fqn for fqn, t in sources.items()}
    outputs = []
    for name, tensor in made.items():
        try:
            pieces = _pieces(tensor, known, sources, ops)
        except _Unknown as e:
            raise PlanError(
                f"{name}: transformers makes it on the way to disk in a way that cannot be followed ({e}); nothing is "
                "written, since it could be wrong."
            ) from e
        for piece in pieces:
            if (held := sources[piece.fqn].dtype) != tensor.dtype:
                raise PlanError(f"{name}: {tensor.dtype} on disk, but made of {piece.fqn} in {held}; not supported.")
        outputs.append(Output(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), pieces))
    return outputs


class _Unknown(Exception):
    pass


@dataclass(frozen=True)
class _Join:
    result: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    dim: int


class _Ops(TorchDispatchMode):
    """Turns copies into aliases, and records by their storage the concatenations and the writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.joins: dict[int, _Join] = {}
        self.written: dict[int, torch.Tensor] = {}  # kept, so that no other storage gets the same id

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _aten.clone.default:
            return _aten.alias.default(args[0])
        if func is _aten.stack.default:
            parts, dim = _joined(*args)
            args = ([t.unsqueeze(dim) for t in parts], dim)
            func = _aten.cat.default
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self.written |= {_storage(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if func is _aten.cat.default:
            parts, dim = _joined(*args)
            self.joins[_storage(result)] = _Join(result, tuple(parts), dim % result.ndim)
        return result


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> tuple[Sequence[torch.Tensor], int]:
    """The arguments of `stack` and `cat`."""
    return parts, dim


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _pieces(tensor: torch.Tensor, known: Mapping[int, str], sources: Tensors, ops: _Ops) -> tuple[Piece, ...]:
    key = _storage(tensor)
    if key in ops.written or tensor.is_neg() or tensor.is_conj():
        raise _Unknown("values are changed in place")
    if key in known:
        return _view(tensor, known[key], sources[known[key]])
    if key not in ops.joins:
        raise _Unknown("new values are computed")
    join = ops.joins[key]
    if (tensor.shape, tensor.stride()) != (join.result.shape, join.result.stride()):
        raise _Unknown("tensors are joined and split again")
    found, position = [], 0
    for part in join.parts:
        for piece in _pieces(part, known, sources, ops):
            if piece.dims is None:
                raise _Unknown("reshaped tensors are joined")
            at = list(piece.at)
            at[join.dim] += position
            found.append(replace(piece, at=tuple(at)))
        position += part.shape[join.dim]
    return tuple(found)


def _view(tensor: torch.Tensor, fqn: str, source: torch.Tensor) -> tuple[Piece]:
    shape = tuple(source.shape)
    if tensor.shape == source.shape and tensor.stride() == source.stride():
        return whole(fqn, shape)
    zeros = (0,) * len(shape)
    if tensor.is_contiguous() and tensor.numel() == source.numel():
        return (Piece(fqn, zeros, shape, None, (0,) * tensor.ndim),)
    start = _unravel(int(tensor.storage_offset()), shape)
    extent, dims = [1] * len(shape), []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        dim = None
        if size != 1:
            fitting = (d for d, n in enumerate(shape) if n > 1 and source.stride(d) == stride and d not in dims)
            dim = next(fitting, None)
            if dim is None or start[dim] + size > shape[dim]:
                raise _Unknown(f"a view of {fqn} that is not a box of it")
            extent[dim] = size
        dims.append(dim)
    return (Piece(fqn, start, tuple(extent), tuple(dims), (0,) * tensor.ndim),)


def _unravel(offset: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for dim in range(len(shape)):
        inner = math.prod(shape[dim + 1 :])
        index.append(offset // inner if inner else 0)
        offset %= inner or 1
    return tuple(index)

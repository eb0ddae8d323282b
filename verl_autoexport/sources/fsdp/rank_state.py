"""The tensors in the records of a rank file's pickle: FSDP's state dict as torch 2.4 to 2.13 write it.

Standard library only, so that every torch's file can be read, whichever torch is installed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NoReturn, TypeGuard

from verl_autoexport.shards.tiling import Index
from verl_autoexport.sources.fsdp.rank_pickle import Call, Name, Refused, Stored

_KINDS = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Untyped": "uint8",
}  # fmt: skip
"""A storage's class without `Storage` → its dtype."""
_MAX_DIMS = 64  # torch's own limit
_MAX_SIZE = 1 << 62
Placement = int | str | None
"""The dimension of a `Shard`, None for `Replicate`, and the text of any other placement."""


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor in a storage: `offset` and `stride` in elements."""

    dtype: str
    shape: Index
    stride: Index
    offset: int
    storage: Stored

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of a device mesh, row-major; `writers` are the ranks that, by its own record, saved it."""

    shape: Index
    ranks: tuple[int, ...]
    writers: tuple[int, ...]

    def coordinate(self, rank: int) -> Index | None:
        """The coordinates of `rank`; None if it is missing, or there more than once."""
        if self.ranks.count(rank) != 1:
            return None
        return unravel(self.ranks.index(rank), self.shape)


@dataclass(frozen=True, slots=True)
class Parts:
    """This rank's part `local` of a DTensor of `shape`; `read_mesh` reads `mesh`."""

    local: Strided
    shape: Index
    placements: tuple[Placement, ...]
    mesh: Call


def unravel(index: int, shape: Index) -> Index:
    """The coordinates of element number `index` in row-major order."""
    found = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        found.append(at)
    return tuple(reversed(found))


def read_tensor(record: Any, whole: bool = True) -> Strided | Parts:
    """The tensor of a record, a DTensor only if `whole`; raises Refused."""
    function, args = _called(record)
    if function in ("_rebuild_parameter", "_rebuild_parameter_with_state") and args:
        function, args = _called(record := args[0])
    if function == "_rebuild_from_type_v2" and len(args) == 4:
        function, kind, args, state = args
        if not isinstance(function, Name) or not isinstance(kind, Name) or not isinstance(args, tuple):
            _refuse(record)
        if whole and kind.leaf == "DTensor" and function.leaf == "_rebuild_wrapper_subclass":
            return _parts(args, state)
        if kind.leaf not in ("Tensor", "Parameter", "Buffer"):
            raise Refused(f"it is a {kind}; expected a plain tensor or a DTensor")
        function = function.leaf
    if function not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        _refuse(record)
    return _strided(args, function == "_rebuild_tensor_v3")


def name_of(record: Any) -> str:
    """The kind of a record, for a message; never its whole content."""
    return str(record.name) if isinstance(record, Call) else str(record) if isinstance(record, Name) else (
        "None" if record is None else type(record).__name__
    )  # fmt: skip


def _refuse(record: Any) -> NoReturn:
    raise Refused(f"it is a {name_of(record)}; expected a plain tensor or a DTensor")


def _called(record: Any) -> tuple[str, tuple[Any, ...]]:
    return (record.name.leaf, record.args) if isinstance(record, Call) else ("", ())


def _is_a(record: Any, name: str) -> TypeGuard[Call]:
    return isinstance(record, Call) and record.name.leaf == name


def _strided(args: tuple[Any, ...], typed: bool) -> Strided:
    """Arguments of torch's `_rebuild_tensor` and its later versions; the third one gives the dtype."""
    storage, offset, size, stride, *more = args
    if not isinstance(storage, Stored) or type(offset) is not int or not 0 <= offset < _MAX_SIZE:
        raise Refused("its storage or offset is not what torch writes")
    if (typed and len(more) < 3) or any(more[3 if typed else 2 :]):
        raise Refused("it has a sign or conjugate bit set, which its bytes do not show")
    dtype = dtype_of(more[2]) if typed else _KINDS.get(storage.kind.removesuffix("Storage"), storage.kind)
    shape, strides = sizes(size), sizes(stride)
    if len(shape) != len(strides):
        raise Refused(f"{len(shape)} sizes and {len(strides)} strides")
    return Strided(dtype, shape, strides, offset, storage)


def _parts(args: tuple[Any, ...], state: Any) -> Parts:
    _, dtype, size, *_ = args
    held = _state(state)
    local, spec = _plain(held.get("_local_tensor")), held.get("_spec")
    if not _is_a(spec, "DTensorSpec"):
        raise Refused("a DTensor without a spec")
    spec, shape = _state(spec.state), sizes(size)
    mesh, placements, meta = spec.get("mesh"), spec.get("placements"), spec.get("tensor_meta")
    if not _is_a(mesh, "DeviceMesh") or not isinstance(placements, tuple | list):
        raise Refused("a DTensor without a device mesh or placements")
    told = [(shape, dtype_of(dtype))]
    if meta is not None:
        described = (*meta.args, *_state(meta.state or {}).values()) if _is_a(meta, "TensorMeta") else ()
        if len(described) < 3:
            raise Refused("its tensor_meta is not what torch writes")
        told.append((sizes(described[0]), dtype_of(described[2])))
    if told.count((shape, local.dtype)) != len(told):
        raise Refused(f"it is {local.dtype} here, and described as {' and '.join(f'{d} {list(s)}' for s, d in told)}")
    _check_order(spec.get("shard_order"))
    return Parts(local, shape, tuple(_placement(p) for p in placements), mesh)


def _check_order(order: Any) -> None:
    """Refuses a shard order other than the default, in which mesh dimensions split a dimension one after the other."""
    for entry in order or ():
        _, dims = entry.args if isinstance(entry, Call) else entry
        if list(sizes(dims)) != sorted(dims):
            raise Refused(f"a dimension is sharded over the mesh dimensions in the order {list(dims)}")


def _placement(record: Any) -> Placement:
    kind, args = _called(record)
    values = args or tuple(_state(record.state or {}).values()) if kind else ()
    if kind == "Shard" and len(values) == 1 and type(values[0]) is int:
        return values[0]
    if kind == "Replicate":
        return None
    text = ", ".join(str(v)[:40] for v in values if isinstance(v, int | str))
    return f"{ {'Partial': 'P', '_StridedShard': '_S'}.get(kind, kind or name_of(record)) }({text})"


def read_mesh(record: Call, values: Callable[[str, Strided], Sequence[int]], rank: int) -> Mesh:
    """The device mesh of a record; `values` reads a tensor's integers, given its name.

    torch up to 2.9 stores the `mesh` itself; later versions store a layout in a map of all
    ranks, which contains the meshes of all replicas; `rank` selects one. Raises Refused.
    """
    state = _state(record.state)
    if state.get("mesh") is not None:
        stored = _plain(state["mesh"])
        shape, ranks = stored.shape, tuple(values("mesh", stored))
    elif state.get("_rank_map") is not None:
        known = tuple(values("_rank_map", _plain(state["_rank_map"])))
        shape, ranks = _laid_out(_axes(state.get("_layout")), known, rank)
    else:
        raise Refused(f"a device mesh of an unknown kind: {', '.join(sorted(map(str, state))[:16])}")
    return Mesh(shape, ranks, tuple(_writers(state, shape, ranks)))


def _writers(state: dict[str, Any], shape: Index, ranks: tuple[int, ...]) -> list[int]:
    writers = [state["_rank"]] if type(state.get("_rank")) is int else []
    at = state.get("_coordinate_on_dim")
    if isinstance(at, list | tuple):
        coordinate = sizes(tuple(at))
        if len(coordinate) != len(shape) or any(c >= n for c, n in zip(coordinate, shape, strict=True)):
            raise Refused(f"coordinates {list(coordinate)} in a device mesh of {list(shape)}")
        index = 0
        for c, n in zip(coordinate, shape, strict=True):
            index = index * n + c
        writers.append(ranks[index])
    return writers


def _axes(layout: Any) -> list[list[tuple[int, int]]]:
    """For each mesh dimension the (size, stride) pairs of the dimensions it was flattened from, or its own pair."""
    state = _state(layout.state) if isinstance(layout, Call) else {}
    if "axes" in state:
        axes = [_state(axis.state) for axis in state["axes"]]
        pairs = [(axis.get("shape"), axis.get("stride")) for axis in axes]
    else:
        shape, stride = state.get("shape"), state.get("stride")
        if not isinstance(shape, tuple):
            pairs = [(shape, stride)]
        elif isinstance(stride, tuple):
            pairs = list(zip(shape, stride, strict=True))
        else:
            raise Refused("a device mesh with several sizes and one stride")
    return [list(zip(_flat(shape), _flat(stride), strict=True)) for shape, stride in pairs]


def _flat(value: Any, depth: int = 4) -> Index:
    """Nested tuples of integers, flattened."""
    if not isinstance(value, tuple) or not depth:
        return sizes((value,))
    if len(value) > _MAX_DIMS:
        raise Refused("a device mesh of too many dimensions")
    return tuple(n for part in value for n in _flat(part, depth - 1))


def _laid_out(axes: list[list[tuple[int, int]]], known: tuple[int, ...], rank: int) -> tuple[Index, tuple[int, ...]]:
    shape = tuple(math.prod(size for size, _ in axis) for axis in axes)
    pairs = [pair for axis in axes for pair in axis]
    if not shape or not 0 < math.prod(shape) <= len(known):
        raise Refused(f"a device mesh of {list(shape)} in one of {len(known)} ranks")
    place = known.index(rank) if rank in known else 0
    begin = place - sum(place // stride % size * stride for size, stride in pairs if stride)
    places = [begin + sum(steps) for steps in product(*(range(0, s * d, d) if d else [0] * s for s, d in pairs))]
    if begin < 0 or max(places) >= len(known) or len(set(places)) != len(places):
        raise Refused(f"a device mesh of {list(shape)} is not laid out within its {len(known)} ranks")
    return shape, tuple(known[p] for p in places)


def _plain(record: Any) -> Strided:
    tensor = read_tensor(record, whole=False)
    assert isinstance(tensor, Strided)
    return tensor


def _state(state: Any) -> dict[str, Any]:
    """An object's attributes; an object with slots has a tuple of two."""
    if isinstance(state, tuple) and len(state) == 2:
        state = (state[0] or {}) | (state[1] or {})
    if not isinstance(state, dict):
        raise Refused(f"attributes are a {name_of(state)}, expected a dictionary")
    return state


def dtype_of(record: Any) -> str:
    """torch's name of a dtype without `torch.`."""
    if not isinstance(record, Name) or record.module != "torch" or not re.fullmatch(r"[a-z]\w*", record.leaf):
        raise Refused(f"its dtype is a {name_of(record)}")
    return record.leaf


def sizes(value: Any) -> Index:
    """A tuple of integers from 0 on, or a `torch.Size` of one."""
    if isinstance(value, Call) and value.name.leaf == "Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        raise Refused(f"sizes are a {name_of(value)}, expected a tuple of integers")
    for n in value:
        if type(n) is not int or not 0 <= n < _MAX_SIZE:
            raise Refused("sizes are not whole numbers from 0 on")
    return value

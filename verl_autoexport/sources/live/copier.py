"""The shards in running workers: each rank's parts, and their copy in host memory. torch only, no collective.

FSDP2 parameters are DTensors whose local part is a box of the tensor. FSDP1 keeps a slice
of a flattened group of parameters (torch 2.13: `FlatParameter._shard_param_infos`), so a
rank's part of one parameter is a range of its flattened values: a few boxes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.manifest import (
    FLOATING,
    ITEMSIZE,
    Shard,
    ShardManifest,
    TensorEntry,
    check_coverage,
    diverged,
)
from verl_autoexport.sources.fsdp.rank_files import local_box

logger = logging.getLogger(__name__)
ALIGNMENT = 64  # bytes; every tensor starts at a multiple, so that views of any dtype are possible
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape, in elements."""
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class Part:
    """Values of the tensor `fqn` of `shape` on one rank: `boxes` of (offsets, shape), one after the other.

    They start at number `start` of the rank's values of the tensor. `dtype` is the copy's dtype,
    `offset` the first byte in the copy's chunk number `chunk`.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    start: int = 0
    chunk: int = 0
    offset: int = 0

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for _, shape in self.boxes)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Layout:
    """The copy of one rank: its parts, and the bytes of each chunk."""

    rank: int
    parts: tuple[Part, ...]
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.chunks)

    @property
    def page_locked_bytes(self) -> int:
        """The bytes of the copy in page-locked memory, which torch takes in powers of two."""
        return sum(1 << (n - 1).bit_length() for n in self.chunks if n)


Values = Callable[[], torch.Tensor]
"""Returns a rank's present values of a tensor, flattened."""


def held_parts(module: torch.nn.Module, rank: int) -> list[tuple[Part, Values]]:
    """Every tensor of the state dict that this rank has to copy.

    Of replicas (HSDP, plain tensors) only the first rank copies. Raises SourceError for an
    unknown layout. The result is valid as long as `identity` stays the same.
    """
    if torch.distributed.is_initialized() and rank != (found := torch.distributed.get_rank()):
        raise SourceError(f"the worker at place {rank} is rank {found}; the workers are not in the order of ranks.")
    if is_flat(module):
        return [*_flat_parts(module), *(_buffers(module) if rank == 0 else ())]
    module.state_dict()  # makes FSDP2 register the sharded parameters again, if it left gathered ones
    named = [*module.named_parameters(remove_duplicate=False), *_persistent(module)]
    found, seen = [], set()
    for fqn, tensor in named:
        if id(tensor) not in seen:  # a tied tensor is copied once
            found += _part(clean(fqn), tensor, rank)
        seen.add(id(tensor))
    return found


def frozen_names(module: torch.nn.Module) -> list[str]:
    """The parameters that training does not change, by their names in a checkpoint."""
    found = []
    for prefix, unit in module.named_modules():
        for name, parameter in unit._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                # FSDP1's flattened parameter stands for the parameters of its unit
                names = getattr(parameter, "_fqns", (name,))
                found += [clean(f"{prefix}.{n}" if prefix else n) for n in names]
    return sorted(set(found))


def identity(module: torch.nn.Module) -> list[int]:
    """A value that changes when a parameter or buffer is replaced by another object."""
    return [id(t) for t in (*module.parameters(), *module.buffers())]


def is_flat(module: torch.nn.Module) -> bool:
    """Whether a module is sharded as flattened parameters, that is, by FSDP1."""
    return any(isinstance(m, FullyShardedDataParallel) for m in module.modules())


def clean(fqn: str) -> str:
    """The name without the parts that wrapping modules add."""
    for wrapper in _WRAPPERS:
        fqn = fqn.replace(wrapper, "")
    return fqn


def _part(fqn: str, tensor: torch.Tensor, rank: int) -> Iterator[tuple[Part, Values]]:
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        if rank == 0:
            yield Part(fqn, _name(tensor.dtype), shape, (((0,) * len(shape), shape),)), partial(_plain, tensor)
        return
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinates = mesh.get_coordinate() or (0,) * len(placements)
    if any(isinstance(p, Replicate) and c for p, c in zip(placements, coordinates, strict=True)):
        return
    extent, offsets = local_box(fqn, shape, mesh.mesh, placements, rank)
    local = tensor.to_local()
    if tuple(local.shape) != extent or not local.is_contiguous():
        raise SourceError(f"{fqn}: rank {rank} should hold {list(extent)}, contiguous; found {list(local.shape)}.")
    if local.numel() or (not math.prod(shape) and rank == 0):
        yield Part(fqn, _name(local.dtype), shape, ((offsets, extent),)), partial(_local, tensor)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1)


def _local(tensor: DTensor) -> torch.Tensor:
    return tensor._local_tensor.detach().reshape(-1)


def _flat_parts(module: torch.nn.Module) -> Iterator[tuple[Part, Values]]:
    for prefix, unit in module.named_modules():
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        handle = getattr(unit, "_handle", None)
        if handle is None or _is_replica(unit):
            continue
        flat = handle.flat_param
        for fqn, shape, info in zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True):
            if not info.in_shard:
                continue
            name = clean(f"{prefix}.{fqn}" if prefix else fqn)
            boxes = flat_boxes(tuple(shape), info.intra_param_start_idx, info.intra_param_end_idx + 1)
            values = partial(_slice, flat, name, info.offset_in_shard, info.numel_in_shard)
            yield Part(name, _name(flat.dtype), tuple(shape), tuple(boxes)), values


def _slice(flat: FlatParameter, fqn: str, offset: int, numel: int) -> torch.Tensor:
    if flat.data.numel() != flat._sharded_size.numel():
        raise SourceError(f"{fqn}: at this moment FSDP1 has it unsharded, so it cannot be copied.")
    return flat.data[offset : offset + numel]


def _is_replica(unit: FullyShardedDataParallel) -> bool:
    """Whether a hybrid-sharded unit is a replica on this rank; the first group's ranks are not."""
    between = getattr(unit, "_inter_node_pg", None)
    return between is not None and torch.distributed.get_rank(between) != 0


def _buffers(module: torch.nn.Module) -> Iterator[tuple[Part, Values]]:
    for fqn, buffer in _persistent(module):
        yield from _part(clean(fqn), buffer, 0)


def _persistent(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that are in a state dict."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements `start` to `stop` of the flattened tensor as (offsets, shape) of boxes, in their order."""
    if stop <= start:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, stop // inner
    if first * inner != start:  # the rest of a row that starts earlier
        end = min(stop, (first + 1) * inner)
        for offsets, extent in flat_boxes(shape[1:], start - first * inner, end - first * inner):
            yield (first, *offsets), (1, *extent)
        start, first = end, first + 1
    if last > first:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
        start = last * inner
    if stop > start:
        for offsets, extent in flat_boxes(shape[1:], 0, stop - start):
            yield (last, *offsets), (1, *extent)


class Copier:
    """Copies a rank's values into host memory, cast to `dtypes` by fqn.

    `groups`, if given, selects the tensors and gives each a number: they are copied in that order,
    and no chunk has tensors of two numbers. `allocate` takes the memory once, for all copies.
    With `clone`, values on a device are first copied there, and `copy` returns at once. `tied`: {alias: name}
    of tensors that must be equal.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        rank: int,
        dtypes: Mapping[str, str],
        chunk_bytes: int,
        clone: bool = False,
        groups: Mapping[str, int] | None = None,
        tied: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.module, self.rank, self.clone, self.groups, self.tied = module, rank, clone, groups, tied
        self._look()
        self.layout = lay_out(rank, self.parts, dtypes, chunk_bytes, groups or {})
        self.chunks: list[torch.Tensor] = []

    def allocate(self, page_locked: bool = True) -> None:
        """Takes the memory: seconds for gigabytes of page-locked memory, or pageable memory if there is none."""
        sizes = self.layout.chunks
        page_locked = page_locked and torch.accelerator.is_available()
        try:
            self.chunks = [torch.empty(n, dtype=torch.uint8, pin_memory=page_locked) for n in sizes]
        except RuntimeError as e:
            logger.warning("verl_autoexport: rank %s: no page-locked memory (%s); copies will be slower", self.rank, e)
            self.chunks = [torch.empty(n, dtype=torch.uint8) for n in sizes]

    def copy(self) -> Callable[[], None]:
        """Returns when training may change the weights; the returned function completes the copy, in any thread.

        Raises SourceError if the layout of the shards has changed since the start, or tied tensors have diverged.
        """
        if identity(self.module) != self.identity:
            known = self.parts
            self._look()
            if self.parts != known:
                raise SourceError(f"rank {self.rank}: the layout of its shards changed after the start of training.")
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # verl offloads parameters to the CPU without waiting for it
        values = {fqn: get() for fqn, get in self.values.items()}
        with torch.no_grad():
            for (alias, own), (name, other) in self.pairs:
                if not _same_bits(own(), other()):
                    raise SourceError(f"rank {self.rank}: {diverged(alias, name)}")
            if self.clone and (device := _device(values)) is not None:
                cast = {p.fqn: getattr(torch, p.dtype) for p in self.layout.parts}
                values = {fqn: tensor.to(cast[fqn], copy=True) for fqn, tensor in values.items()}
                torch.accelerator.current_stream(device).synchronize()
                return partial(self._finish, values, device)
            self._fill(values)
        return lambda: None

    def _look(self) -> None:
        everything = held_parts(self.module, self.rank)
        held = [(p, v) for p, v in everything if self.groups is None or p.fqn in self.groups]
        self.identity = identity(self.module)
        self.pairs = self._pairs({part.fqn: (part, get) for part, get in everything})
        self.parts = [part for part, _ in held]
        self.values = {part.fqn: get for part, get in held}

    def _pairs(self, held: Mapping[str, tuple[Part, Values]]) -> list[tuple[tuple[str, Values], tuple[str, Values]]]:
        """The tied pairs to compare here: two parameters of which not both are copied."""
        pairs, copied = [], self.groups or {}
        for alias, name in self.tied.items():
            if alias not in held or (alias in copied and name in copied):
                continue  # one parameter, or compared when the copy is exported
            if name not in held or held[alias][0].boxes != held[name][0].boxes:
                raise SourceError(f"rank {self.rank}: {alias} and {name} are tied, but no longer sharded alike.")
            pairs.append(((alias, held[alias][1]), (name, held[name][1])))
        return pairs

    def _finish(self, clones: dict[str, torch.Tensor], device: torch.device) -> None:
        try:
            with torch.no_grad(), torch.Stream(device):
                self._fill(clones)
        finally:
            clones.clear()  # frees the device's memory, since the caller still has this closure

    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        for part in self.layout.parts:
            dtype, source = getattr(torch, part.dtype), values[part.fqn][part.start : part.start + part.numel]
            into = self.chunks[part.chunk][part.offset : part.offset + part.nbytes].view(dtype)
            # From a device, the cast comes before the transfer; on the CPU it fills the chunk, without another copy.
            into.copy_(source if source.device.type == "cpu" else source.to(dtype), non_blocking=True)
        if (device := _device(values)) is not None:
            torch.accelerator.current_stream(device).synchronize()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _device(values: Mapping[str, torch.Tensor]) -> torch.device | None:
    """The device of the values, None for the CPU (offloaded parameters come and go)."""
    return next((v.device for v in values.values() if v.device.type != "cpu"), None)


def lay_out(
    rank: int,
    parts: Sequence[Part],
    dtypes: Mapping[str, str],
    chunk_bytes: int,
    groups: Mapping[str, int] = MappingProxyType({}),
) -> Layout:
    """The layout of a copy: tensors one after the other in chunks of at most `chunk_bytes`; larger ones are cut.

    Tensors are ordered by their numbers in `groups`; a new number starts a new chunk.
    """
    placed, chunks, used, last = [], [], 0, None
    for whole in sorted(parts, key=lambda p: groups.get(p.fqn, 0)):
        group, last = last, groups.get(whole.fqn, 0)
        dtype = dtypes.get(whole.fqn, whole.dtype) if whole.dtype in FLOATING else whole.dtype
        for part in _cut(replace(whole, dtype=dtype), chunk_bytes // ITEMSIZE[dtype]):
            if used and (group != last or used + part.nbytes > chunk_bytes):
                chunks.append(used)
                used = 0
            group = last
            placed.append(replace(part, chunk=len(chunks), offset=used))
            used += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(rank, tuple(placed), (*chunks, used))


def _cut(part: Part, limit: int) -> Iterator[Part]:
    """`part`, or several of at most `limit` elements each."""
    if part.numel <= limit:
        yield part
        return
    for begin in range(0, part.numel, limit):
        end, boxes, position = min(begin + limit, part.numel), [], 0
        for offsets, shape in part.boxes:
            size = math.prod(shape)
            lo, hi = max(begin - position, 0), min(end - position, size)
            for inner, extent in flat_boxes(shape, lo, hi):
                boxes.append((tuple(a + b for a, b in zip(offsets, inner, strict=True)), extent))
            position += size
        yield replace(part, boxes=tuple(boxes), start=begin)


def make_manifest(
    layouts: Sequence[Layout], files: Sequence[Sequence[Any]], backend: str, fingerprint: str
) -> ShardManifest:
    """The manifest of all ranks' parts; `files[i]` are the chunks of `layouts[i]`. SourceError if parts are missing."""
    numbers, tensors = {}, {}
    for layout, chunks in zip(layouts, files, strict=True):
        for number in range(len(chunks)):
            numbers[layout.rank, number] = len(numbers)
    for layout in layouts:
        for part in layout.parts:
            shards, offset = [], part.offset
            for offsets, shape in part.boxes:
                shards.append(Shard(layout.rank, offsets, shape, numbers[layout.rank, part.chunk], offset))
                offset += math.prod(shape) * ITEMSIZE[part.dtype]
            tensors.setdefault(part.fqn, (part.dtype, part.shape, []))[2].extend(shards)
    entries = {fqn: TensorEntry(fqn, dtype, shape, tuple(shards)) for fqn, (dtype, shape, shards) in tensors.items()}
    for entry in entries.values():
        check_coverage(entry)
    return ShardManifest(tuple(f for chunks in files for f in chunks), entries, len(layouts), backend, fingerprint)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

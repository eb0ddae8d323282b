"""The data that a source of weights gives to the planner; standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.archive_records import Record
from verl_autoexport.shards.tiling import Index, find_flaw, overlap

ITEMSIZE = {
    "float64": 8, "int64": 8, "uint64": 8,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes per element of every dtype that safetensors can hold, by torch's name."""
FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a tensor: `shape` elements from `offsets` on (both in elements, per dimension).

    Its bytes lie contiguous and row-major in file number `file` of the manifest from
    `byte_offset` on. With `count` > 1 it stands for a run of so many shards, one after the other
    along `dim`: number i belongs to rank `rank + i * stride`, in file `file + i * stride`. So a
    tensor that is spread evenly over a thousand ranks is one Shard.
    """

    rank: int
    offsets: Index
    shape: Index
    file: int
    byte_offset: int
    count: int = 1
    dim: int = 0
    stride: int = 1

    @property
    def extent(self) -> Index:
        """The shape of the box that all shards of the run fill together."""
        return self.shape if self.count == 1 else _with(self.shape, self.dim, self.shape[self.dim] * self.count)

    def number(self, i: int) -> Shard:
        """The shard number i of the run."""
        if self.count == 1:
            return self
        offsets = _with(self.offsets, self.dim, self.offsets[self.dim] + i * self.shape[self.dim])
        step = i * self.stride
        return Shard(self.rank + step, offsets, self.shape, self.file + step, self.byte_offset)

    def cuts(self, offsets: Index, shape: Index) -> Iterator[Cut]:
        """The cuts of the run with the box of `shape` at `offsets`; shards that are whole along `dim` share one cut."""
        at, extent = overlap(offsets, shape, self.offsets, self.extent)
        if not math.prod(extent):
            return
        local = tuple(a - b for a, b in zip(at, self.offsets, strict=True))
        if self.count == 1:
            yield Cut(0, 1, local, extent, at, extent)
            return
        d, size = self.dim, self.shape[self.dim]
        begin, end = local[d], local[d] + extent[d]
        while begin < end:
            first, skipped = divmod(begin, size)
            count = 1 if skipped else max(1, (end - begin) // size)
            rows = min(size - skipped, end - begin)
            box = _with(local, d, skipped), _with(extent, d, rows)
            yield Cut(first, count, *box, _with(at, d, self.offsets[d] + begin), _with(extent, d, rows * count))
            begin += rows * count


@dataclass(frozen=True, slots=True)
class Cut:
    """The box of `shape` at `local` in each of `count` shards of a run, from number `first` on.

    Together they are the box of `extent` at `at` of the tensor.
    """

    first: int
    count: int
    local: Index
    shape: Index
    at: Index
    extent: Index


def _with(index: Index, dim: int, n: int) -> Index:
    return (*index[:dim], n, *index[dim + 1 :])


def join_runs(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """The shards, joined into runs where they differ only in rank, file and place along one dimension."""
    runs: list[Shard] = []
    for shard in shards:
        longer = _longer(runs[-1], shard) if runs else None
        if longer is None:
            runs.append(shard)
        else:
            runs[-1] = longer
    return tuple(runs)


def _longer(run: Shard, shard: Shard) -> Shard | None:
    """The `run` with `shard` added; None if that is not the next one."""
    if shard.shape != run.shape or shard.byte_offset != run.byte_offset or shard.count != 1:
        return None
    moved = [d for d, (a, b) in enumerate(zip(run.offsets, shard.offsets, strict=True)) if a != b]
    step = shard.rank - run.rank
    if run.count == 1:
        longer = replace(run, count=2, dim=moved[0], stride=step) if len(moved) == 1 and step > 0 else None
    else:
        longer = replace(run, count=run.count + 1) if moved == [run.dim] else None
    if longer is None or not run.shape[longer.dim] or longer.number(longer.count - 1) != shard:
        return None
    return longer


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor under its in-memory name, with its global shape and every shard of it once.

    `dtype` is that of the bytes; `loaded` is the dtype that training cast them to, if it did.
    """

    fqn: str
    dtype: str
    shape: Index
    shards: tuple[Shard, ...]
    loaded: str | None = None

    @property
    def value_dtype(self) -> str:
        return self.loaded or self.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def diverged(alias: str, name: str) -> str:
    """The reason why two tensors that should be one cannot be written as one."""
    return (
        f"{alias} and {name} are tied according to config.json, but their values differ: writing one of them "
        "would lose the other. Set tie_word_embeddings=false in the model's config if it was trained untied."
    )


class Memory(Protocol):
    """Bytes that are not in a file of this node; the object can be sent to other processes."""

    def read(self, into: memoryview, offset: int, end: int) -> None:
        """Fills `into` with the bytes from `offset` on; raises SourceError if they are lost.

        The tensor of the same rank continues there up to `end`.
        """

    def let_go(self) -> None:
        """Frees the bytes, which cannot be read again."""


@dataclass(frozen=True)
class ShardManifest:
    """All tensors of a source, and the files, or blocks of memory, with their bytes.

    `fingerprint` identifies the content. `records` are, by number of file, the records with a CRC-32; the bytes
    read from such a file are noted, and compared with them. `notes` are for the record of the export. `on_disk`: the
    tensors have the names, and the layout, of a saved model, and not those in memory.
    """

    files: tuple[Path | Memory, ...]
    tensors: Mapping[str, TensorEntry]
    world_size: int
    backend: str
    fingerprint: str
    records: Mapping[int, tuple[Record, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    on_disk: bool = False


def check_coverage(entry: TensorEntry) -> None:
    """Raises SourceError unless the shards tile the tensor: every element exactly once."""
    shards = entry.shards
    flaw = find_flaw([(s.offsets, s.extent) for s in shards], entry.shape)
    if flaw is None:
        return
    if flaw.kind == "volume":
        parts = ", ".join(f"{_ranks(s)}: {list(s.extent)} at {list(s.offsets)}" for s in shards[:8])
        raise SourceError(
            f"{entry.fqn}: the local shapes do not add up to the global shape {list(entry.shape)}: expected "
            f"{math.prod(entry.shape)} elements, found {flaw.found} ({parts}). The checkpoint is incomplete or mixed; "
            "save it again."
        )
    blamed = [shards[i] for i in flaw.boxes]
    if flaw.kind == "outside":
        raise SourceError(
            f"{entry.fqn}: {_ranks(blamed[0])} holds {list(blamed[0].extent)} at {list(blamed[0].offsets)}, "
            f"which is outside the global shape {list(entry.shape)}."
        )
    raise SourceError(f"{entry.fqn}: {_ranks(blamed[0])} and {_ranks(blamed[1])} hold overlapping parts.")


def _ranks(shard: Shard) -> str:
    last = shard.rank + (shard.count - 1) * shard.stride
    return f"rank {shard.rank}" if shard.count == 1 else f"ranks {shard.rank} to {last}"

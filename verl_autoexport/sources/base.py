"""What a source of weights hands to the planner; standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from verl_autoexport.errors import SourceError

ITEMSIZE = {
    "float64": 8, "int64": 8, "uint64": 8,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes per element of every dtype that safetensors can hold, by torch's name."""
FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class Shard:
    """A box of a tensor: `shape` elements from `offsets` on (both in elements, per dimension).

    Its bytes lie contiguous and row-major in file number `file` of the manifest from
    `byte_offset` on.
    """

    rank: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: int
    byte_offset: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor under its in-memory name, with its global shape and every shard of it once.

    `dtype` is that of the bytes; `loaded` the one that training cast them to, where it did.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]
    loaded: str | None = None

    @property
    def value_dtype(self) -> str:
        return self.loaded or self.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Memory(Protocol):
    """A block of bytes that is no file; it can be sent to other processes."""

    def view(self) -> memoryview:
        """The bytes; raises SourceError when they are lost."""


@dataclass(frozen=True)
class ShardManifest:
    """All tensors of a source, and the files, or blocks of memory, that their bytes are in.

    `fingerprint` identifies the content: it changes when a file is written again.
    """

    files: tuple[Path | Memory, ...]
    tensors: Mapping[str, TensorEntry]
    world_size: int
    backend: str
    fingerprint: str


class ShardSource(Protocol):
    """Where weights come from: `kind` is `checkpoint` or `live`, `directory` holds `huggingface/`, the model's config.

    `manifest` reads metadata only; all methods raise SourceError.
    """

    kind: str
    directory: Path
    fingerprint: str

    def manifest(self) -> ShardManifest: ...

    def check_sums(self) -> None:
        """Raises unless the bytes are those that were saved, as far as that can be told."""

    def check_unchanged(self) -> None:
        """Raises unless the source is what it was when `manifest` was read."""


def check_coverage(entry: TensorEntry) -> None:
    """Raise SourceError unless the shards tile the tensor: every element exactly once."""
    total = math.prod(entry.shape)
    volume = sum(math.prod(s.shape) for s in entry.shards)
    if volume != total:
        parts = ", ".join(f"rank {s.rank}: {list(s.shape)} at {list(s.offsets)}" for s in entry.shards[:8])
        raise SourceError(
            f"{entry.fqn}: the local shapes do not add up to the global shape {list(entry.shape)}: expected {total} "
            f"elements, found {volume} ({parts}). The checkpoint is incomplete or mixed; save it again."
        )
    solid = sorted((s for s in entry.shards if math.prod(s.shape)), key=lambda s: s.offsets)
    for shard in solid:
        if any(o < 0 or o + n > d for o, n, d in zip(shard.offsets, shard.shape, entry.shape, strict=True)):
            raise SourceError(
                f"{entry.fqn}: rank {shard.rank} holds {list(shard.shape)} at {list(shard.offsets)}, "
                f"which is outside the global shape {list(entry.shape)}."
            )
    for i, a in enumerate(solid):
        for b in solid[i + 1 :]:
            if b.offsets[:1] and b.offsets[0] >= a.offsets[0] + a.shape[0]:
                break  # sorted by the first dimension: nothing further can overlap `a`
            if _overlap(a, b):
                raise SourceError(f"{entry.fqn}: ranks {a.rank} and {b.rank} hold overlapping parts.")


def _overlap(a: Shard, b: Shard) -> bool:
    return all(
        ao < bo + bn and bo < ao + an for ao, an, bo, bn in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    )

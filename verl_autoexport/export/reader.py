"""Boxes of source tensors out of the shard files, by position and in bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from verl_autoexport.errors import MergeError, SourceError
from verl_autoexport.sources.base import ITEMSIZE, Shard, ShardManifest, TensorEntry
from verl_autoexport.sources.tiling import Index

MAX_BLOCK = 2 << 20  # bytes; measured: 1 MiB costs more in calls, 4 MiB brings nothing for twice the memory
_OPEN = 256  # files at a time; a process may often have 1024


class ShardReader:
    """Positional reads, for one thread. A context manager; it closes the files.

    `cached` False then lets go of the page cache of what was read.
    """

    def __init__(self, manifest: ShardManifest, cached: bool = True) -> None:
        self.manifest, self.cached = manifest, cached
        self.fds: dict[int, int] = {}
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self.fds:
            self._close_first()

    def _close_first(self) -> None:
        fd = self.fds.pop(next(iter(self.fds)))
        if not self.cached:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def whole(self, fqn: str) -> torch.Tensor:
        """The global tensor in the dtype that training holds it in."""
        entry = self.manifest.tensors[fqn]
        out = torch.empty(entry.shape, dtype=getattr(torch, entry.value_dtype))
        for offsets, shape in boxes(entry.shape, MAX_BLOCK // ITEMSIZE[entry.dtype]):
            self.fill(fqn, offsets, shape, out[within(offsets, shape)])
        return out

    def fill(self, fqn: str, offsets: Index, shape: Index, out: torch.Tensor) -> None:
        """Fill `out` (of `shape`, any strides) with the box at `offsets` of the global tensor, cast to `out`'s dtype.

        Raises MergeError unless shards cover the box exactly, SourceError when a file is too short.
        """
        entry = self.manifest.tensors[fqn]
        filled = 0
        for shard in self._touching(entry, offsets, shape):
            lo, extent = overlap(offsets, shape, shard.offsets, shard.shape)
            if not math.prod(extent):
                continue
            part = self._read(entry, shard, tuple(a - b for a, b in zip(lo, shard.offsets, strict=True)), extent)
            target = within(tuple(a - b for a, b in zip(lo, offsets, strict=True)), extent)
            out[target].copy_(part if entry.loaded is None else part.to(getattr(torch, entry.loaded)))
            filled += part.numel()
        if filled != math.prod(shape):
            raise MergeError(f"{fqn}: {filled} of {math.prod(shape)} elements at {list(offsets)} are covered.")

    def ranges(self, entry: TensorEntry, offsets: Index, shape: Index) -> list[tuple[int, int, int]]:
        """(file descriptor, offset, bytes) of what the box is in row-major order; empty unless it is whole rows."""
        found = []
        inner, size = math.prod(shape[1:]), ITEMSIZE[entry.dtype]
        for shard in sorted(self._touching(entry, offsets, shape), key=lambda s: s.offsets):
            lo, extent = overlap(offsets, shape, shard.offsets, shard.shape)
            if not math.prod(extent):
                continue
            if (
                not isinstance(self.manifest.files[shard.file], Path)
                or (extent[1:], shard.shape[1:]) != (shape[1:],) * 2
            ):
                return []
            begin = shard.byte_offset + (lo[0] - shard.offsets[0]) * inner * size if shape else shard.byte_offset
            found.append((self._open(shard, entry.fqn), begin, math.prod(extent) * size))
        return found

    def _touching(self, entry: TensorEntry, offsets: Index, shape: Index) -> Iterator[Shard]:
        return (one for run in entry.shards for one in run.touching(offsets, shape))

    def _read(self, entry: TensorEntry, shard: Shard, local: Index, extent: Index) -> torch.Tensor:
        """The box at `local` of the shard, one read for each run of it that is contiguous in the file."""
        size = ITEMSIZE[entry.dtype]
        count = math.prod(extent) * size
        if self.buffer.numel() < count:
            self.buffer = torch.empty(count, dtype=torch.uint8)
        view = self.buffer[:count]
        data = memoryview(view.numpy())
        outer = _outer_dims(extent, shard.shape)
        run = math.prod(extent[outer:]) * size
        for number, index in enumerate(_indices(extent[:outer])):
            first = 0
            for i, dim in enumerate(shard.shape):
                first = first * dim + local[i] + (index[i] if i < outer else 0)
            into = data[number * run : (number + 1) * run]
            self._pread(shard, into, shard.byte_offset + first * size, entry.fqn)
        return view.view(getattr(torch, entry.dtype)).reshape(extent)

    def _open(self, shard: Shard, fqn: str) -> int:
        if shard.file not in self.fds:
            if len(self.fds) == _OPEN:
                self._close_first()
            path = self.manifest.files[shard.file]
            try:
                self.fds[shard.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise SourceError(f"{path} (rank {shard.rank}): {fqn} cannot be read: {e.strerror}.") from e
        return self.fds[shard.file]

    def _pread(self, shard: Shard, into: memoryview, offset: int, fqn: str) -> None:
        path = self.manifest.files[shard.file]
        if not isinstance(path, Path):
            path.read(into, offset)
            return
        fd, done = self._open(shard, fqn), 0
        try:
            while done < len(into):
                n = os.preadv(fd, [into[done:]], offset + done)
                if n == 0:
                    raise SourceError(
                        f"{path} (rank {shard.rank}): ends at byte {offset + done}, but {fqn} goes on to "
                        f"{offset + len(into)}; the file was truncated while being exported."
                    )
                done += n
        except OSError as e:
            raise SourceError(f"{path} (rank {shard.rank}): {fqn} cannot be read: {e.strerror}.") from e


def equal_values(manifest: ShardManifest, a: str, b: str) -> bool:
    """Whether two tensors of the source hold the same bits, block by block."""
    left, right = manifest.tensors[a], manifest.tensors[b]
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.shards == right.shards:
        return True  # saved once: tied tensors share their storage in the file
    dtype = getattr(torch, left.dtype)
    with ShardReader(manifest) as reader:
        for offsets, shape in boxes(left.shape, MAX_BLOCK // ITEMSIZE[left.dtype]):
            parts = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            reader.fill(a, offsets, shape, parts[0])
            reader.fill(b, offsets, shape, parts[1])
            if bytes(as_bytes(parts[0])) != bytes(as_bytes(parts[1])):
                return False
    return True


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def within(offsets: Index, shape: Index) -> tuple[slice, ...]:
    """The index of a box in the tensor that holds it."""
    return tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))


def overlap(offsets: Index, shape: Index, others: Index, extent: Index) -> tuple[Index, Index]:
    """(offsets, shape) of what two boxes have in common, in the coordinates of both; empty ones have a 0 in shape."""
    lo = tuple(max(a, b) for a, b in zip(offsets, others, strict=True))
    hi = (min(a + n, b + m) for a, n, b, m in zip(offsets, shape, others, extent, strict=True))
    return lo, tuple(max(0, h - low) for low, h in zip(lo, hi, strict=True))


def boxes(shape: Index, limit: int) -> Iterator[tuple[Index, Index]]:
    """(offsets, shape) of row-major contiguous boxes of at most `limit` elements that tile `shape` in order."""
    if not math.prod(shape):
        return
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield (0,) * len(shape), shape
        return
    axis -= 1  # the first axis, from the right, that does not fit as a whole
    rows = max(1, limit // inner)
    for prefix in _indices(shape[:axis]):
        for start in range(0, shape[axis], rows):
            count = min(rows, shape[axis] - start)
            yield (*prefix, start, *(0,) * (len(shape) - axis - 1)), (*(1,) * axis, count, *shape[axis + 1 :])


def _outer_dims(extent: Index, shape: Index) -> int:
    """How many leading dimensions of a box in `shape` split it into runs that are contiguous in memory."""
    outer = len(extent)
    while outer > 0 and extent[outer - 1] == shape[outer - 1]:
        outer -= 1
    outer = max(0, outer - 1)  # the run may be a part of the next dimension
    while outer > 0 and extent[outer - 1] == 1:
        outer -= 1
    return outer


def _indices(shape: Index) -> Iterator[Index]:
    if not shape:
        yield ()
        return
    for head in range(shape[0]):
        for tail in _indices(shape[1:]):
            yield head, *tail

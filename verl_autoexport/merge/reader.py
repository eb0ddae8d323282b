"""Reads boxes of source tensors from the shard files, by position and in bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from verl_autoexport.errors import MergeError, SourceError
from verl_autoexport.shards.checksums import Sums
from verl_autoexport.shards.manifest import ITEMSIZE, Cut, Shard, ShardManifest, TensorEntry
from verl_autoexport.shards.tiling import Index
from verl_autoexport.system.page_cache import drop_cache

MAX_BLOCK = 2 << 20  # bytes; measured: 1 MiB costs more in calls, 4 MiB gains nothing for twice the memory
_OPEN = 256  # files at a time; a process may often have 1024


class Range(NamedTuple):
    """Bytes of file number `file` of a manifest, and its descriptor."""

    fd: int
    file: int
    offset: int
    nbytes: int


class ShardReader:
    """Positional reads, for one thread. A context manager; it closes the files.

    `cached` False removes the bytes read from the page cache. `sums` receives all bytes read of files with
    records.
    """

    def __init__(self, manifest: ShardManifest, cached: bool = True, sums: Sums | None = None) -> None:
        self.manifest, self.cached, self.sums = manifest, cached, sums
        self.fds: dict[int, int] = {}
        self.opened: set[Path] = set()
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds.values():
            os.close(fd)
        if not self.cached:
            for path in self.opened:
                drop_cache(path)

    def whole(self, fqn: str) -> torch.Tensor:
        """The global tensor in training's dtype."""
        entry = self.manifest.tensors[fqn]
        out = torch.empty(entry.shape, dtype=getattr(torch, entry.value_dtype))
        for offsets, shape in boxes(entry.shape, MAX_BLOCK // ITEMSIZE[entry.dtype]):
            self.fill(fqn, offsets, shape, out[within(offsets, shape)])
        return out

    def fill(self, fqn: str, offsets: Index, shape: Index, out: torch.Tensor) -> None:
        """Fills `out` (of `shape`, any strides) with the box at `offsets` of the global tensor, cast to `out`'s dtype.

        Raises MergeError unless shards cover the box exactly, SourceError if a file is too short.
        """
        entry = self.manifest.tensors[fqn]
        filled = 0
        for shard in entry.shards:
            for cut in shard.cuts(offsets, shape):
                target = out[within(tuple(a - b for a, b in zip(cut.at, offsets, strict=True)), cut.extent)]
                self._fill(entry, shard, cut, target)
                filled += target.numel()
        if filled != math.prod(shape):
            raise MergeError(f"{fqn}: {filled} of {math.prod(shape)} elements at {list(offsets)} are covered.")

    def ranges(self, entry: TensorEntry, offsets: Index, shape: Index) -> Iterator[Range] | None:
        """The byte ranges of the box in row-major order; None unless it consists of whole rows.

        A range's descriptor is valid until the next range is requested.
        """
        found = [(shard, cut) for shard in entry.shards for cut in shard.cuts(offsets, shape)]
        for shard, cut in found:
            rows = (cut.shape[1:], shard.shape[1:]) == (shape[1:],) * 2
            if not rows or not isinstance(self.manifest.files[shard.file], Path):
                return None
        return self._ranges(entry, sorted(found, key=lambda both: both[1].at))

    def note(self, ranges: Iterable[Range], data: memoryview) -> None:
        """Takes note of `data`, all bytes of `ranges`, which were read elsewhere."""
        at = 0
        for part in ranges:
            self._note(part.file, part.offset, data[at : at + part.nbytes])
            at += part.nbytes

    def _note(self, file: int, offset: int, data: memoryview) -> None:
        if self.sums is not None and file in self.manifest.records:
            self.sums.add(file, offset, data)

    def _ranges(self, entry: TensorEntry, found: Sequence[tuple[Shard, Cut]]) -> Iterator[Range]:
        size = ITEMSIZE[entry.dtype]
        for shard, cut in found:
            skipped = cut.local[0] * math.prod(cut.shape[1:]) * size if cut.local else 0
            for number in range(cut.first, cut.first + cut.count):
                fd = self._open(shard, number, entry.fqn)
                file = shard.file + number * shard.stride
                yield Range(fd, file, shard.byte_offset + skipped, math.prod(cut.shape) * size)

    def _fill(self, entry: TensorEntry, shard: Shard, cut: Cut, target: torch.Tensor) -> None:
        """Copies all shards of a cut at once, or not at all if they are in `target` in the order of the files."""
        dtype = getattr(torch, entry.dtype)
        in_order = cut.count == 1 or shard.dim == 0
        if in_order and target.dtype == dtype and entry.loaded is None and target.is_contiguous():
            self._read(entry, shard, cut, as_bytes(target))
            return
        nbytes = target.numel() * ITEMSIZE[entry.dtype]
        if self.buffer.numel() < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        held = self.buffer[:nbytes]
        self._read(entry, shard, cut, held.numpy().data)
        part = held.view(dtype)
        if in_order:
            part = part.view(target.shape)
        else:
            part = part.view(cut.count, *cut.shape).movedim(0, shard.dim)
            target = target.unflatten(shard.dim, (cut.count, cut.shape[shard.dim]))
        target.copy_(part if entry.loaded is None else part.to(getattr(torch, entry.loaded)))

    def _read(self, entry: TensorEntry, shard: Shard, cut: Cut, into: memoryview) -> None:
        """Reads the boxes of a cut one after the other, with one read for each run that is contiguous in its file."""
        size = ITEMSIZE[entry.dtype]
        outer = _outer_dims(cut.shape, shard.shape)
        run = math.prod(cut.shape[outer:]) * size
        begins = []
        for index in _indices(cut.shape[:outer]):
            first = 0
            for i, dim in enumerate(shard.shape):
                first = first * dim + cut.local[i] + (index[i] if i < outer else 0)
            begins.append(shard.byte_offset + first * size)
        at = 0
        for number in range(cut.first, cut.first + cut.count):
            for begin in begins:
                self._pread(entry, shard, number, into[at : at + run], begin)
                at += run

    def _open(self, shard: Shard, number: int, fqn: str) -> int:
        step = number * shard.stride
        file, rank = shard.file + step, shard.rank + step
        if file not in self.fds:
            if len(self.fds) == _OPEN:
                os.close(self.fds.pop(next(iter(self.fds))))  # opened again for the next block
            path = self.manifest.files[file]
            assert isinstance(path, Path)  # bytes in memory are not opened: see `ranges` and `_pread`
            self.opened.add(path)
            try:
                self.fds[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise SourceError(f"{path} (rank {rank}): {fqn} cannot be read: {e.strerror}.") from e
        return self.fds[file]

    def _pread(self, entry: TensorEntry, shard: Shard, number: int, into: memoryview, offset: int) -> None:
        step, fqn = number * shard.stride, entry.fqn
        path, rank = self.manifest.files[shard.file + step], shard.rank + step
        if not isinstance(path, Path):
            path.read(into, offset, shard.byte_offset + math.prod(shard.shape) * ITEMSIZE[entry.dtype])
            self._note(shard.file + step, offset, into)
            return
        fd, done = self._open(shard, number, fqn), 0
        try:
            while done < len(into):
                n = os.preadv(fd, [into[done:]], offset + done)
                if n == 0:
                    raise SourceError(
                        f"{path} (rank {rank}): ends at byte {offset + done}, but {fqn} goes on to "
                        f"{offset + len(into)}; the file was truncated while being exported."
                    )
                done += n
        except OSError as e:
            raise SourceError(f"{path} (rank {rank}): {fqn} cannot be read: {e.strerror}.") from e
        self._note(shard.file + step, offset, into)


def equal_values(manifest: ShardManifest, a: str, b: str, sums: Sums | None = None) -> bool:
    """Whether two tensors of the source have the same bits, compared block by block."""
    left, right = manifest.tensors[a], manifest.tensors[b]
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.shards == right.shards:
        return True  # saved once: tied tensors share their storage in the file
    dtype = getattr(torch, left.dtype)
    with ShardReader(manifest, sums=sums) as reader:
        for offsets, shape in boxes(left.shape, MAX_BLOCK // ITEMSIZE[left.dtype]):
            parts = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            reader.fill(a, offsets, shape, parts[0])
            reader.fill(b, offsets, shape, parts[1])
            if bytes(as_bytes(parts[0])) != bytes(as_bytes(parts[1])):
                return False
    return True


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def within(offsets: Index, shape: Index) -> tuple[slice, ...]:
    """The index of a box in its tensor."""
    return tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))


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
    axis -= 1  # the first axis, from the right, that does not fit whole
    rows = max(1, limit // inner)
    for prefix in _indices(shape[:axis]):
        for start in range(0, shape[axis], rows):
            count = min(rows, shape[axis] - start)
            yield (*prefix, start, *(0,) * (len(shape) - axis - 1)), (*(1,) * axis, count, *shape[axis + 1 :])


def _outer_dims(extent: Index, shape: Index) -> int:
    """The number of leading dimensions that split a box in `shape` into runs contiguous in memory."""
    outer = len(extent)
    while outer > 0 and extent[outer - 1] == shape[outer - 1]:
        outer -= 1
    outer = max(0, outer - 1)  # the run may be part of the next dimension
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

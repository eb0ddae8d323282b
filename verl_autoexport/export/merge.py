"""One planned file → bytes on disk, in bounded memory.

The output is produced front to back in blocks that are contiguous on disk, so that it can
be hashed as it is written; of each shard the part that falls into the block is read by
position. Whatever the sharded dimension, such a part is contiguous in the shard's file too.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from verl_autoexport.errors import MergeError, SourceError
from verl_autoexport.export import naming
from verl_autoexport.export.plan import Group, Output, PlannedFile
from verl_autoexport.sources.base import FLOATING, ITEMSIZE, Shard, ShardManifest, TensorEntry

MAX_BLOCK = 16 << 20  # bytes; larger blocks were not faster, smaller ones cost system calls
Converter = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class WrittenFile:
    """Name, size in bytes and sha256 (hex) of a file that is on disk and fsynced."""

    name: str
    nbytes: int
    sha256: str


def merge_file(
    planned: PlannedFile,
    manifest: ShardManifest,
    path: Path,
    *,
    memory_budget: int,
    convert: Converter | None = None,
    progress: Progress = lambda nbytes: None,
) -> WrittenFile:
    """Write `planned` to `path` (which must not exist) and fsync it.

    Holds at most `memory_budget` bytes of buffers, except where `convert`, transformers'
    reverse conversion, needs a whole source tensor. `progress` is called with the bytes of
    each block. Raises MergeError (tensor named) for NaN, Inf or an overflow in the cast and
    for write errors, SourceError when a shard is shorter than it was.
    """
    # Two output blocks (one is written while the next is filled) and two for reading, of at most 4x the width.
    block = max(4096, min(MAX_BLOCK, memory_budget // 8))
    ring = cycle([torch.empty(block, dtype=torch.uint8) for _ in range(2)])
    with _Reader(manifest) as reader, _Writer(path) as writer:
        writer.write(planned.header)
        for group in planned.groups:
            entry = manifest.tensors[group.fqn]
            blocks = (
                _converted(group, entry, reader, convert) if group.convert else _cast(group, entry, reader, ring, block)
            )
            for data in blocks:
                writer.write(data)
                progress(len(data))
        digest, size = writer.finish()
    if size != planned.nbytes:
        raise MergeError(f"{path}: {size} bytes written, {planned.nbytes} planned; this is a bug, please report it.")
    return WrittenFile(planned.name, size, digest)


@dataclass(frozen=True)
class MergeJob:
    """All that a worker in another process needs to write one file.

    `model_dir`, `dtype`, `trust_remote_code` and `architecture` rebuild the skeleton there,
    only when a group needs transformers' reverse conversion.
    """

    planned: PlannedFile
    manifest: ShardManifest
    path: Path
    memory_budget: int
    model_dir: Path
    dtype: str
    trust_remote_code: bool = False
    external_lib: str | None = None
    architecture: str | None = None

    def run(self, progress: Progress = lambda nbytes: None) -> WrittenFile:
        convert = None
        if any(g.convert for g in self.planned.groups):
            skeleton = naming.build_skeleton(
                self.model_dir,
                self.dtype,
                trust_remote_code=self.trust_remote_code,
                external_lib=self.external_lib,
                architecture=self.architecture,
            )
            convert = partial(naming.reverse, skeleton)
        return merge_file(
            self.planned, self.manifest, self.path, memory_budget=self.memory_budget, convert=convert, progress=progress
        )


def equal_values(manifest: ShardManifest, a: str, b: str) -> bool:
    """Whether two tensors of the source hold the same bits, block by block."""
    left, right = manifest.tensors[a], manifest.tensors[b]
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.shards == right.shards:
        return True  # saved once: tied tensors share their storage in the file
    dtype = getattr(torch, left.dtype)
    with _Reader(manifest) as reader:
        for offsets, shape in boxes(left.shape, MAX_BLOCK // ITEMSIZE[left.dtype]):
            parts = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            reader.fill(left, offsets, shape, parts[0])
            reader.fill(right, offsets, shape, parts[1])
            if bytes(_bytes(parts[0])) != bytes(_bytes(parts[1])):
                return False
    return True


def boxes(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
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


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for head in range(shape[0]):
        for tail in _indices(shape[1:]):
            yield head, *tail


def _cast(
    group: Group, entry: TensorEntry, reader: _Reader, ring: Iterator[torch.Tensor], block: int
) -> Iterator[memoryview]:
    (output,) = group.outputs
    size = ITEMSIZE[output.dtype]
    for offsets, shape in boxes(entry.shape, block // size):
        buffer = next(ring)  # once per block: the other one may still be being written
        out = buffer[: math.prod(shape) * size].view(getattr(torch, output.dtype)).view(shape)
        reader.fill(entry, offsets, shape, out)
        _check_finite(output, entry, out)
        yield _bytes(out)


def _converted(group: Group, entry: TensorEntry, reader: _Reader, convert: Converter | None) -> Iterator[memoryview]:
    if convert is None:
        raise MergeError(f"{group.fqn}: needs transformers' reverse conversion, but none was given.")
    dtypes = {o.dtype for o in group.outputs}
    whole = torch.empty(entry.shape, dtype=getattr(torch, dtypes.pop() if len(dtypes) == 1 else entry.dtype))
    for offsets, shape in boxes(entry.shape, MAX_BLOCK // ITEMSIZE[entry.dtype]):
        part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
        reader.fill(entry, offsets, shape, part)
    made = convert({group.fqn: whole})
    for output in group.outputs:
        tensor = made.pop(output.name).to(getattr(torch, output.dtype))
        tensor = tensor.transpose(-1, -2) if output.swapped else tensor
        if tuple(tensor.shape) != output.shape:
            raise MergeError(f"{output.name}: planned {output.dtype} {list(output.shape)}, converted to {tensor.shape}")
        _check_finite(output, entry, tensor)
        yield _bytes(tensor.contiguous())


def _check_finite(output: Output, entry: TensorEntry, out: torch.Tensor) -> None:
    if output.dtype not in FLOATING or not out.numel():
        return
    if all(torch.isfinite(x) for x in torch.aminmax(out)):  # NaN propagates; far faster than isfinite on every value
        return
    nan = int(torch.isnan(out).sum())
    inf = int(torch.isinf(out).sum())
    cause = f"the weights of {entry.fqn} hold them, or" if output.dtype != entry.dtype else "the weights hold them:"
    hint = f"the cast {entry.dtype} → {output.dtype} overflowed" if output.dtype != entry.dtype else "training diverged"
    raise MergeError(
        f"{output.name}: {nan} NaN and {inf} Inf values; {cause} {hint}. A model like this is not published."
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class _Reader:
    """Positional reads of boxes out of the shard files, each file opened once."""

    def __init__(self, manifest: ShardManifest) -> None:
        self.paths = manifest.files
        self.fds: dict[int, int] = {}
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds.values():
            os.close(fd)

    def fill(self, entry: TensorEntry, offsets: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out` (of `shape`) with the box at `offsets` of the global tensor, cast to `out`'s dtype."""
        filled = 0
        for shard in entry.shards:
            lo = [max(a, b) for a, b in zip(offsets, shard.offsets, strict=True)]
            hi = [min(a + n, b + m) for a, n, b, m in zip(offsets, shape, shard.offsets, shard.shape, strict=True)]
            if any(h <= low for low, h in zip(lo, hi, strict=True)):
                continue
            extent = tuple(h - low for low, h in zip(lo, hi, strict=True))
            part = self._read(entry, shard, tuple(low - o for low, o in zip(lo, shard.offsets, strict=True)), extent)
            target = tuple(slice(low - o, h - o) for low, h, o in zip(lo, hi, offsets, strict=True))
            out[target].copy_(part)
            filled += part.numel()
        if filled != math.prod(shape):
            raise MergeError(f"{entry.fqn}: {filled} of {math.prod(shape)} elements at {list(offsets)} are covered.")

    def _read(self, entry: TensorEntry, shard: Shard, local: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
        size = ITEMSIZE[entry.dtype]
        first = 0
        for index, dim in zip(local, shard.shape, strict=True):
            first = first * dim + index
        count = math.prod(extent) * size
        if self.buffer.numel() < count:
            self.buffer = torch.empty(count, dtype=torch.uint8)
        view = self.buffer[:count]
        self._pread(shard, memoryview(view.numpy()), shard.byte_offset + first * size, entry.fqn)
        return view.view(getattr(torch, entry.dtype)).reshape(extent)

    def _pread(self, shard: Shard, into: memoryview, offset: int, fqn: str) -> None:
        path = self.paths[shard.file]
        try:
            if shard.file not in self.fds:
                self.fds[shard.file] = os.open(path, os.O_RDONLY)
            done = 0
            while done < len(into):
                n = os.preadv(self.fds[shard.file], [into[done:]], offset + done)
                if n == 0:
                    raise SourceError(
                        f"{path} (rank {shard.rank}): ends at byte {offset + done}, but {fqn} goes on to "
                        f"{offset + len(into)}; the file was truncated while being exported."
                    )
                done += n
        except OSError as e:
            raise SourceError(f"{path} (rank {shard.rank}): {fqn} cannot be read: {e.strerror}.") from e


class _Writer:
    """Writes and hashes blocks in order, in two threads, one block behind the caller."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hash = hashlib.sha256()
        self.size = 0
        self.pending: list[Future[None]] = []

    def __enter__(self) -> _Writer:
        try:
            self.file = open(self.path, "xb", buffering=0)
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be created: {e.strerror}.") from e
        self.pool = ThreadPoolExecutor(2)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True)
        self.file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Hand over a block; `data` must not change until the next call returns."""
        self._wait()
        self.pending = [self.pool.submit(self.hash.update, data), self.pool.submit(self._write, data)]

    def finish(self) -> tuple[str, int]:
        self._wait()
        try:
            os.fsync(self.file.fileno())
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be flushed to disk: {e.strerror}.") from e
        return self.hash.hexdigest(), self.size

    def _wait(self) -> None:
        for future in self.pending:
            future.result()

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be written: {e.strerror}.") from e
        self.size += len(data)

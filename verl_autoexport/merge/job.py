"""One planned file → bytes on disk, in bounded memory.

The output is produced front to back in blocks that are contiguous on disk, so that it can be
hashed as it is written; each shard's part in the block is read by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from threading import Lock

import torch

from verl_autoexport.errors import MergeError
from verl_autoexport.merge.plan import Output, PlannedFile, nbytes
from verl_autoexport.merge.reader import MAX_BLOCK, Range, ShardReader, as_bytes, boxes, within
from verl_autoexport.merge.writer import FileWriter
from verl_autoexport.shards.checksums import Run, Sums
from verl_autoexport.shards.manifest import FLOATING, ITEMSIZE, ShardManifest
from verl_autoexport.shards.tiling import Index, overlap

Progress = Callable[[int], None]
_WORTH_A_COPY = 1 << 20  # bytes; for fewer a system call costs more than it saves


@dataclass(frozen=True)
class WrittenFile:
    """Name, size in bytes and sha256 (hex) of a file that is on disk and fsynced.

    Of the tensors with a transform, `affected` are those that it should change, and `changed` those
    that came out different. `apart`: the tensors do not change between versions; `linked`: the file
    is the same as an earlier version's. `read` has the byte ranges read from files that carry
    CRC-32s.
    """

    name: str
    nbytes: int
    sha256: str
    affected: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    apart: bool = False
    linked: bool = False
    read: tuple[Run, ...] = ()


@dataclass(frozen=True)
class MergeJob:
    """The description of one file for a worker in another process; `memory_budget` in bytes.

    `cached` False keeps the bytes read out of the page cache, `read_again` False those written;
    `threads` share the file.
    """

    planned: PlannedFile
    manifest: ShardManifest
    path: Path
    memory_budget: int
    cached: bool = True
    read_again: bool = True
    threads: int = 1

    def run(self, progress: Progress = lambda nbytes: None) -> WrittenFile:
        """Writes the file (which must not exist) and fsyncs it; `progress` is called with the bytes of each block.

        Holds at most `memory_budget` bytes of buffers, and one transformed tensor with its transform's memory.
        Raises MergeError (tensor named) for NaN, Inf or an overflow in the cast and for write
        errors, SourceError if a shard is shorter than before.
        """
        threads = 1 if self.planned.transforms else self.threads  # otherwise each would transform the same tensor
        # Each thread has buffers for two output blocks and for the input of one, at most 4x as wide.
        # Tensors that training had in another dtype are held in that too, at most 2x as wide.
        largest = max((getattr(file, "block", MAX_BLOCK) for file in self.manifest.files), default=MAX_BLOCK)
        block = max(4096, min(largest, self.memory_budget // (8 * threads)))
        with FileWriter(self.path, self.read_again) as writer:
            writer.write(self.planned.header, 0)
            writer.hash(self.planned.header, 0)
            work = _Work(self, writer, block, progress)
            work.share(threads)
            digest, size = writer.finish()
        if size != self.planned.nbytes:
            raise MergeError(f"{self.path}: {size} bytes written, {self.planned.nbytes} planned; please report this.")
        affected, changed = frozenset(work.affected), frozenset(work.changed)
        read = work.sums.runs()
        return WrittenFile(self.planned.name, size, digest, affected, changed, self.planned.apart, read=read)


@dataclass(frozen=True)
class _Block:
    """A box of an output, contiguous from byte `at` of the file on; `unchanged`: its bytes are those of the shards."""

    output: Output
    offsets: Index
    shape: Index
    at: int
    unchanged: bool


@dataclass
class _Buffer:
    """Bytes that may be overwritten once the file is hashed up to `end`."""

    data: torch.Tensor
    end: int = 0


class _Work:
    """The blocks of a file in order, for several threads: one hashes while others fill."""

    def __init__(self, job: MergeJob, writer: FileWriter, size: int, progress: Progress) -> None:
        self.job, self.writer, self.size, self.progress = job, writer, size, progress
        self.blocks = self._blocks()
        self.lock = Lock()
        self.affected: set[str] = set()
        self.changed: set[str] = set()
        self.sums = Sums()

    def share(self, threads: int) -> None:
        """Does all the work in `threads`; each has two buffers, so that it continues while another hashes its first."""
        if threads == 1:
            self.do(buffers=1)
            return
        with ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(self.do, buffers=2) for _ in range(threads)]
            try:
                for future in running:
                    future.result()
            except BaseException as e:  # including those that end the process: the threads must end first
                self.writer.break_off(e)
                raise

    def do(self, buffers: int) -> None:
        """Fills, checks, writes and hashes one block after the other."""
        ring = cycle([_Buffer(torch.empty(self.size, dtype=torch.uint8)) for _ in range(buffers)])
        try:
            with ShardReader(self.job.manifest, self.job.cached, self.sums) as reader:
                source = _Source(reader, self.job.planned, self)
                while block := self._next():
                    self._write(block, source, next(ring))
        except BaseException as e:
            self.writer.break_off(e)
            raise

    def _next(self) -> _Block | None:
        with self.lock:
            self.writer.wait(0)  # not after a failure
            return next(self.blocks, None)

    def _blocks(self) -> Iterator[_Block]:
        at = len(self.job.planned.header)
        for output in self.job.planned.outputs:
            unchanged, size = self._unchanged(output), ITEMSIZE[output.dtype]
            for offsets, shape in boxes(_box_of(output), self.size // size):
                yield _Block(output, offsets, shape, at, unchanged)
                at += math.prod(shape) * size

    def _unchanged(self, output: Output) -> bool:
        piece = output.pieces[0]
        entry = self.job.manifest.tensors[piece.fqn]
        same = output.dtype == entry.dtype == entry.value_dtype and piece.fqn not in self.job.planned.transforms
        return same and _straight(output) and nbytes(output) >= _WORTH_A_COPY

    def _write(self, block: _Block, source: _Source, buffer: _Buffer) -> None:
        output = block.output
        self.writer.wait(buffer.end)
        nbytes = math.prod(block.shape) * ITEMSIZE[output.dtype]
        out = buffer.data[:nbytes].view(getattr(torch, output.dtype)).view(block.shape)
        data = as_bytes(out)
        if block.unchanged and self.writer.copies and (copied := self._copy(block, source.reader)):
            self.writer.read_back(data, block.at)
            source.reader.note(copied, data)
        else:
            _fill(output, source, block.offsets, block.shape, out)
            self.writer.write(data, block.at)
        _check_finite(output, self.job.manifest, out)
        self.writer.hash(data, block.at)
        buffer.end = block.at + nbytes
        with self.lock:
            try:
                self.progress(nbytes)
            except BaseException as e:
                self.writer.break_off(e)  # before another thread takes a block
                raise

    def _copy(self, block: _Block, reader: ShardReader) -> list[Range]:
        """Has the file system copy whole rows of shards; returns none if that is impossible."""
        piece, at, copied = block.output.pieces[0], block.at, []
        ranges = reader.ranges(reader.manifest.tensors[piece.fqn], _sum(piece.offsets, block.offsets), block.shape)
        for part in ranges or ():
            if not self.writer.copy(part.fd, part.offset, part.nbytes, at):
                return []  # later writes replace the rows copied so far
            copied.append(part)
            at += part.nbytes
        return copied


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limits torch to one thread: its idle threads spin on cores that hashing and writing need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Source:
    """The source tensors for the plan: from the shards, and transformed if the plan says so."""

    def __init__(self, reader: ShardReader, planned: PlannedFile, work: _Work) -> None:
        self.reader = reader
        self.transforms = planned.transforms
        self.work = work
        self.last: tuple[str, torch.Tensor] | None = None  # a transformed tensor is read in several boxes

    def fill(self, fqn: str, offsets: Index, shape: Index, out: torch.Tensor) -> None:
        if fqn not in self.transforms:
            self.reader.fill(fqn, offsets, shape, out)
            return
        if self.last is None or self.last[0] != fqn:
            self.last = None  # freed before the next one is made
            self.last = fqn, self._transformed(fqn, out.dtype)
        out.copy_(self.last[1][within(offsets, shape)])

    def _transformed(self, fqn: str, dtype: torch.dtype) -> torch.Tensor:
        transform, before = self.transforms[fqn], self.reader.whole(fqn)
        others = [self.reader.whole(name) for name in transform.sources]
        after = transform.apply(before, *others).to(dtype)
        if transform.has_effect(*others):
            self.work.affected.add(fqn)
        if not torch.equal(after, before.to(dtype)):
            self.work.changed.add(fqn)
        return after


def _straight(output: Output) -> bool:
    """Whether the output is an unchanged box of one source tensor."""
    return len(output.pieces) == 1 and output.pieces[0].in_order


def _box_of(output: Output) -> Index:
    return output.pieces[0].shape if _straight(output) else output.shape


def _sum(a: Index, b: Index) -> Index:
    return tuple(map(sum, zip(a, b, strict=True)))


def _fill(output: Output, source: _Source, offsets: Index, shape: Index, out: torch.Tensor) -> None:
    """Fills `out` with the box at `offsets` of an output."""
    if _straight(output):
        piece = output.pieces[0]
        source.fill(piece.fqn, _sum(piece.offsets, offsets), shape, out)
    else:
        _fill_pieces(output, source, offsets, shape, out)


def _fill_pieces(output: Output, source: _Source, offsets: Index, shape: Index, out: torch.Tensor) -> None:
    """Fills `out` with the box at `offsets` of an output that consists of pieces or is transposed."""
    filled = 0
    for piece in output.pieces:
        lo, extent = overlap(offsets, shape, piece.at, piece.extent)
        if not math.prod(extent):
            continue
        if piece.dims is None:
            raise MergeError(f"{output.name}: {piece.fqn} is reshaped and joined with others; please report this.")
        target = out[within(tuple(a - b for a, b in zip(lo, offsets, strict=True)), extent)]
        start, size = list(piece.offsets), [1] * len(piece.shape)
        for i, dim in enumerate(piece.dims):
            if dim is not None:
                start[dim] += lo[i] - piece.at[i]
                size[dim] = extent[i]
        source.fill(piece.fqn, tuple(start), tuple(size), _as_source(target, piece.dims, len(piece.shape)))
        filled += math.prod(extent)
    if filled != math.prod(shape):
        raise MergeError(f"{output.name}: {filled} of {math.prod(shape)} elements at {list(offsets)} are covered.")


def _as_source(out: torch.Tensor, dims: Sequence[int | None], ndim: int) -> torch.Tensor:
    """A view of `out`, a box of the output, with the `ndim` dimensions of the source tensor; `dims` as in `Piece`."""
    out = out[tuple(0 if dim is None else slice(None) for dim in dims)]
    named = [dim for dim in dims if dim is not None]
    out = out.permute(sorted(range(len(named)), key=named.__getitem__))
    for dim in sorted(set(range(ndim)) - set(named)):
        out = out.unsqueeze(dim)
    return out


def _check_finite(output: Output, manifest: ShardManifest, out: torch.Tensor) -> None:
    if output.dtype not in FLOATING or not out.numel():
        return
    if all(torch.isfinite(x) for x in torch.aminmax(out)):  # NaN propagates; far faster than isfinite on every value
        return
    nan = int(torch.isnan(out).sum())
    inf = int(torch.isinf(out).sum())
    entry = manifest.tensors[output.pieces[0].fqn]
    if output.dtype == entry.dtype == "float16" and inf and not nan:  # the live source has already cast
        hint = "a cast to float16 overflowed, or training diverged"
        raise MergeError(f"{output.name}: {inf} Inf values: {hint}. A model like this is not published.")
    cause = f"the weights of {entry.fqn} have them, or" if output.dtype != entry.dtype else "the weights have them:"
    hint = f"the cast {entry.dtype} → {output.dtype} overflowed" if output.dtype != entry.dtype else "training diverged"
    raise MergeError(
        f"{output.name}: {nan} NaN and {inf} Inf values; {cause} {hint}. A model like this is not published."
    )

"""One planned file → bytes on disk, in bounded memory.

The output is produced front to back in blocks that are contiguous on disk, so that it can
be hashed as it is written; of each shard the part that falls into the block is read by
position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

from verl_autoexport.errors import MergeError
from verl_autoexport.export import lora
from verl_autoexport.export.plan import Output, Piece, PlannedFile, nbytes
from verl_autoexport.export.reader import MAX_BLOCK, ShardReader, as_bytes, boxes, overlap, within
from verl_autoexport.export.writer import FileWriter
from verl_autoexport.sources.base import FLOATING, ITEMSIZE, ShardManifest
from verl_autoexport.sources.tiling import Index

Progress = Callable[[int], None]
_WORTH_A_COPY = 1 << 20  # bytes; below that a system call costs more than it saves


@dataclass(frozen=True)
class WrittenFile:
    """Name, size in bytes and sha256 (hex) of a file that is on disk and fsynced.

    Of the tensors with LoRA fused in: those whose lora_B is not zero (`trained`), and those
    that came out different from the base (`changed`). `apart`: its tensors do not change between
    versions; `linked`: it is the same file as that of an earlier one.
    """

    name: str
    nbytes: int
    sha256: str
    trained: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    apart: bool = False
    linked: bool = False


@dataclass(frozen=True)
class MergeJob:
    """All that a worker in another process needs to write one file; `memory_budget` in bytes.

    `cached` False keeps the page cache free of what is read and written.
    """

    planned: PlannedFile
    manifest: ShardManifest
    path: Path
    memory_budget: int
    cached: bool = True

    def run(self, progress: Progress = lambda nbytes: None) -> WrittenFile:
        """Write the file (which must not exist) and fsync it; `progress` is called with the bytes of each block.

        Holds at most `memory_budget` bytes of buffers, and one tensor with LoRA fused into it.
        Raises MergeError (tensor named) for NaN, Inf or an overflow in the cast and for write
        errors, SourceError when a shard is shorter than it was.
        """
        # Two output blocks (one is written while the next is filled) and two for reading, of at most 4x the width.
        largest = max((getattr(file, "block", MAX_BLOCK) for file in self.manifest.files), default=MAX_BLOCK)
        block = max(4096, min(largest, self.memory_budget // 8))
        ring = cycle([torch.empty(block, dtype=torch.uint8) for _ in range(2)])
        with ShardReader(self.manifest, self.cached) as reader, FileWriter(self.path, self.cached) as writer:
            source = _Source(reader, self.planned)
            writer.write(self.planned.header)
            for output in self.planned.outputs:
                copied = _copy(output, source, writer)
                for data in _blocks(output, copied or source, self.manifest, ring, block):
                    (writer.hashed if copied else writer.write)(data)
                    progress(len(data))
            digest, size = writer.finish()
        if size != self.planned.nbytes:
            raise MergeError(f"{self.path}: {size} bytes written, {self.planned.nbytes} planned; please report this.")
        trained, changed = frozenset(source.trained), frozenset(source.changed)
        return WrittenFile(self.planned.name, size, digest, trained, changed, self.planned.apart)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads wait actively, on the cores that hashing and writing need; those of one merge are enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Source:
    """Source tensors as the plan wants them: from the shards, and with LoRA fused in where it says so."""

    def __init__(self, reader: ShardReader, planned: PlannedFile) -> None:
        self.reader = reader
        self.fusions = planned.fusions
        self.trained: set[str] = set()
        self.changed: set[str] = set()
        self.last: tuple[str, torch.Tensor] | None = None  # a fused tensor is read in several boxes

    def fill(self, fqn: str, offsets: Index, shape: Index, out: torch.Tensor) -> None:
        if fqn not in self.fusions:
            self.reader.fill(fqn, offsets, shape, out)
            return
        if self.last is None or self.last[0] != fqn:
            self.last = None  # freed before the next one is made
            self.last = fqn, self._fused(fqn, out.dtype)
        out.copy_(self.last[1][within(offsets, shape)])

    def _fused(self, fqn: str, dtype: torch.dtype) -> torch.Tensor:
        fusion, base = self.fusions[fqn], self.reader.whole(fqn)
        a, b, magnitude = (
            None if name is None else self.reader.whole(name) for name in (fusion.a, fusion.b, fusion.magnitude)
        )
        fused = lora.fuse(fusion, base, a, b, magnitude).to(dtype)
        if b.any():
            self.trained.add(fqn)
        if not torch.equal(fused, base.to(dtype)):
            self.changed.add(fqn)
        return fused


class _Copied:
    """An output that the kernel copied into the file, read back from it front to back."""

    def __init__(self, writer: FileWriter, position: int) -> None:
        self.writer, self.position = writer, position

    def fill(self, fqn: str, offsets: Index, shape: Index, out: torch.Tensor) -> None:
        data = as_bytes(out)
        self.writer.read_back(data, self.position)
        self.position += len(data)


def _copy(output: Output, source: _Source, writer: FileWriter) -> _Copied | None:
    """Where bytes need no change, let the kernel copy whole rows of shards; None where that is not possible."""
    piece, position = output.pieces[0], writer.size
    entry = source.reader.manifest.tensors[piece.fqn]
    same = output.dtype == entry.dtype == entry.value_dtype and piece.fqn not in source.fusions
    if not same or len(output.pieces) > 1 or not piece.in_order or nbytes(output) < _WORTH_A_COPY:
        return None
    ranges = source.reader.ranges(entry, piece.offsets, piece.shape)
    if ranges and all(writer.copy(*where) for where in ranges):
        return _Copied(writer, position)
    writer.size = position  # what was copied before one could not be is written over
    return None


def _blocks(
    output: Output, source: _Source | _Copied, manifest: ShardManifest, ring: Iterator[torch.Tensor], block: int
) -> Iterator[memoryview]:
    """The bytes of `output`, front to back. A block must be used before the one after the next is asked for."""
    first, size = output.pieces[0], ITEMSIZE[output.dtype]
    straight = len(output.pieces) == 1 and first.in_order
    for offsets, shape in boxes(first.shape if straight else output.shape, block // size):
        buffer = next(ring)  # once per block: the other one may still be being written
        out = buffer[: math.prod(shape) * size].view(getattr(torch, output.dtype)).view(shape)
        if straight:
            source.fill(first.fqn, tuple(map(sum, zip(first.offsets, offsets, strict=True))), shape, out)
        else:
            _fill(output, source, offsets, shape, out)
        _check_finite(output, manifest, out)
        yield as_bytes(out)


def _fill(output: Output, source: _Source, offsets: Index, shape: Index, out: torch.Tensor) -> None:
    """Fill `out` with the box at `offsets` of an output that is put together of pieces, or turned."""
    filled = 0
    for piece in output.pieces:
        lo, extent = overlap(offsets, shape, piece.at, piece.extent)
        if not math.prod(extent):
            continue
        target = out[within(tuple(a - b for a, b in zip(lo, offsets, strict=True)), extent)]
        start, size = list(piece.offsets), [1] * len(piece.shape)
        for i, dim in enumerate(piece.dims):
            if dim is not None:
                start[dim] += lo[i] - piece.at[i]
                size[dim] = extent[i]
        source.fill(piece.fqn, tuple(start), tuple(size), _as_source(target, piece))
        filled += math.prod(extent)
    if filled != math.prod(shape):
        raise MergeError(f"{output.name}: {filled} of {math.prod(shape)} elements at {list(offsets)} are covered.")


def _as_source(out: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A view of `out`, a box of the output, with the dimensions of the source tensor."""
    out = out[tuple(0 if dim is None else slice(None) for dim in piece.dims)]
    named = [dim for dim in piece.dims if dim is not None]
    out = out.permute(sorted(range(len(named)), key=named.__getitem__))
    for dim in sorted(set(range(len(piece.shape))) - set(named)):
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
    if output.dtype == entry.dtype == "float16" and inf and not nan:  # the live source has cast already
        hint = "a cast to float16 overflowed, or training diverged"
        raise MergeError(f"{output.name}: {inf} Inf values: {hint}. A model like this is not published.")
    cause = f"the weights of {entry.fqn} hold them, or" if output.dtype != entry.dtype else "the weights hold them:"
    hint = f"the cast {entry.dtype} → {output.dtype} overflowed" if output.dtype != entry.dtype else "training diverged"
    raise MergeError(
        f"{output.name}: {nan} NaN and {inf} Inf values; {cause} {hint}. A model like this is not published."
    )

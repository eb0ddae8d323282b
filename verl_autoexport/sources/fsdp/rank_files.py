"""verl's FSDP and FSDP2 checkpoint: one `model_world_size_W_rank_R.pt` per rank.

Written by `torch.save` in `verl/utils/checkpoint/fsdp_checkpoint_manager.py` (verl 0.9.1):
`{fqn: DTensor | Tensor}`. Its pickle is read as data, which runs nothing; the bytes are
read later by position, so a file truncated in between is an error and not a SIGBUS.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.archive_records import Mark, Record, difference, mark, read_records
from verl_autoexport.shards.checksums import Run
from verl_autoexport.shards.manifest import (
    ITEMSIZE,
    Memory,
    Shard,
    ShardManifest,
    TensorEntry,
    check_coverage,
    join_runs,
)
from verl_autoexport.shards.tiling import Index
from verl_autoexport.sources.fsdp.discovery import BLOCK, brief, digest, rank_files
from verl_autoexport.sources.fsdp.discovery import notes as left_out
from verl_autoexport.sources.fsdp.rank_pickle import Call, Refused, unpickle
from verl_autoexport.sources.fsdp.rank_state import (
    Mesh,
    Parts,
    Placement,
    Strided,
    name_of,
    read_mesh,
    read_tensor,
    unravel,
)
from verl_autoexport.sources.fsdp.same_save import check_one_save
from verl_autoexport.sources.fsdp.torch_archive import Storage, read_archive
from verl_autoexport.system.cpus import cores
from verl_autoexport.system.page_cache import drop_cache
from verl_autoexport.system.untrusted import read_json

CHANGED = "changed while being exported. The step was saved again meanwhile; export it again."
_INTEGERS: Mapping[str, Literal["i", "q"]] = {"int32": "i", "int64": "q"}
"""dtype → its code in a `memoryview`."""
_DAMAGED = "The file is truncated or damaged, or holds more than plain tensors and DTensors (`weights_only`)."


@dataclass(frozen=True)
class Piece:
    """The entry of one tensor in one rank file; `offsets` is None for a plain tensor.

    `crc` is the CRC-32 of its bytes, 0 if unknown.
    """

    dtype: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    offsets: tuple[int, ...] | None
    byte_offset: int
    crc: int = 0


class FsdpFiles:
    """The shards of one role in one checkpoint, e.g. `global_step_10/actor`.

    Every method raises SourceError if the files are missing, damaged or contradictory.
    """

    kind = "checkpoint"

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.paths = rank_files(self.directory)
        self.marks = [mark(path) for path in self.paths]

    @property
    def fingerprint(self) -> str:
        return digest(self.marks)

    def check_unchanged(self) -> None:
        """Raises if a file changed: verl rewrites files when it saves a step again, and links keep no old content."""
        if changed := [seen.name for path, seen in zip(self.paths, self.marks, strict=True) if mark(path) != seen]:
            raise SourceError(f"{self.directory}: {', '.join(changed)} {CHANGED}")

    def verify_checksums(self, manifest: ShardManifest, runs: Sequence[Run], progress: Callable[[int], None]) -> None:
        by_file, ended = runs_by_file(runs), Event()
        with ThreadPoolExecutor(min(4, cores())) as pool:
            try:
                running = [
                    pool.submit(compare, self.paths[i], i, self.marks[i], records, by_file.get(i, ()), ended)
                    for i, records in manifest.records.items()
                ]
                for done in as_completed(running):
                    progress(done.result())
            finally:
                ended.set()

    def drop_cache(self) -> None:
        for path in self.paths:
            drop_cache(path)

    def manifest(self) -> ShardManifest:
        records = [read_records(path) for path in self.paths]
        ranks = [read_rank_file(path, rank, records[rank]) for rank, path in enumerate(self.paths)]
        self.check_unchanged()  # both come from one save
        notes = [*check_one_save(self.paths), *left_out(self.directory)]
        return make_manifest(self.directory, ranks, self.paths, self.fingerprint, records, notes)


def compare(
    path: Path, rank: int, seen: Mark, records: Sequence[Record], runs: Sequence[Run], ended: Event | None = None
) -> int:
    """Raises SourceError unless the file still has the content of `records`, `seen` and `runs`; returns its bytes."""
    found = difference(path, records, runs, lambda: ended is None or not ended.is_set())
    if found is None:
        return sum(record.nbytes for record in records)
    record, crc = found
    why = "the file " + CHANGED
    if mark(path) == seen:
        why = (
            "its bytes are not those that training wrote. A disk or a copy damaged the file, or a save overwrites "
            "it now; copy or save it again."
        )
    where = f"{path} (rank {rank}): {_tensor_in(path, rank, record)}"
    raise SourceError(f"{where}: CRC-32 {record.crc:08x} expected, {crc:08x} found: {why}")


def _tensor_in(path: Path, rank: int, record: Record) -> str:
    """The tensor whose bytes are in a record, and the record's name."""
    with suppress(SourceError):
        for fqn, piece in read_rank_file(path, rank).items():
            if record.begin <= piece.byte_offset < record.begin + record.nbytes:
                return f"{fqn} ({record.name})"
    return record.name


def runs_by_file(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """The runs by number of their file, in their order."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.file, []).append(run)
    return found


def make_manifest(
    directory: Path,
    ranks: Sequence[dict[str, Piece]],
    files: Sequence[Path | Memory],
    fingerprint: str,
    records: Sequence[tuple[Record, ...]],
    notes: Sequence[str] = (),
) -> ShardManifest:
    """The pieces of all ranks, rank i's in `files[i]`; `directory` holds `fsdp_config.json`. Raises SourceError."""
    _check_same_keys(directory, ranks)
    tensors = {fqn: _assemble(fqn, [r[fqn] for r in ranks], files) for fqn in ranks[0]}
    checked = {number: found for number, found in enumerate(records) if found}
    if count := len(files) - len(checked):
        notes = (
            *notes,
            f"the content of {count} of {len(files)} rank files could not be checked: training wrote no CRC-32s into "
            "them (torch.serialization.set_crc32_options); only their size and time were compared",
        )
    return ShardManifest(tuple(files), tensors, len(files), _backend(directory), fingerprint, checked, tuple(notes))


def read_rank_file(path: Path, rank: int, records: Sequence[Record] = ()) -> dict[str, Piece]:
    """Reads the metadata of one rank file, but no weight.

    Only the few numbers of the device meshes are read from storages. `records` are those of the
    expected save, as far as they are known.
    """
    size = path.stat().st_size
    if size == 0:
        raise SourceError(f"{path} (rank {rank}): the file is empty (0 bytes); the save was interrupted.")
    file = RankFile(path, rank)
    if records and not file.is_of(records):
        raise SourceError(f"{path} (rank {rank}): the file {CHANGED}")
    fqn, pieces = None, {}
    try:
        for fqn, record in file.state().items():
            pieces[fqn] = file.piece(fqn, record)
    except SourceError:
        raise
    except Exception as e:  # Refused, or whatever else foreign data cause
        fqn = e.key if isinstance(e, Refused) and e.key is not None else fqn
        what = f"{fqn} in {path} (rank {rank}, {size} bytes)" if fqn else f"{path} (rank {rank}, {size} bytes)"
        detail = str(e) if isinstance(e, Refused) else f"its description of its tensors cannot be read: {e!r:.300}"
        raise SourceError(f"{what}: not a whole torch file of plain tensors: {detail}. {_DAMAGED}") from e
    return pieces


class RankFile:
    """One rank file: `storages` come from its archive, `meshes` are its device meshes by record, each read once."""

    def __init__(self, path: Path, rank: int) -> None:
        archive = read_archive(path, rank)
        self.path, self.rank, self.pickled, self.storages = path, rank, archive.pickled, archive.storages
        self.meshes: dict[int, Mesh] = {}

    def is_of(self, records: Sequence[Record]) -> bool:
        """Whether names, shapes and storages match the records of a save."""
        known, crc = {(record.begin, record.nbytes, record.crc) for record in records}, zlib.crc32(self.pickled)
        named = any(nbytes == len(self.pickled) and written in (0, crc) for _, nbytes, written in known)
        return named and {(s.begin, s.nbytes, s.crc) for s in self.storages.values()} <= known

    def state(self) -> dict[str, Any]:
        """The record of each tensor; raises Refused."""
        state = unpickle(self.pickled)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise Refused(f"expected a dict of tensors, found {name_of(state)}")
        return state

    def piece(self, fqn: str, record: Any) -> Piece:
        where = f"{fqn} in {self.path} (rank {self.rank})"
        tensor = read_tensor(record)
        local = tensor.local if isinstance(tensor, Parts) else tensor
        begin, nbytes, storage = self.find(where, local)
        shape, offsets = local.shape, None
        if isinstance(tensor, Parts):
            shape, mesh = tensor.shape, self.mesh(where, tensor.mesh)
            expected, offsets = _box(fqn, shape, mesh, tensor.placements, self.rank)
            if expected != local.shape:
                raise SourceError(
                    f"{where}: the local shapes do not add up to the global shape {list(shape)}: with "
                    f"placements {_show(tensor.placements)} this rank should hold {list(expected)}, found "
                    f"{list(local.shape)}."
                )
        crc = storage.crc if nbytes == storage.nbytes else 0
        return Piece(local.dtype, shape, local.shape, offsets, begin, crc)

    def find(self, where: str, tensor: Strided) -> tuple[int, int, Storage]:
        """The first byte of a tensor, its length in bytes, and its storage."""
        if tensor.dtype not in ITEMSIZE:
            raise SourceError(f"{where}: dtype {tensor.dtype} cannot be stored in safetensors.")
        if not tensor.contiguous:
            raise SourceError(f"{where}: the tensor is not contiguous (strides {tensor.stride}); not supported.")
        size = ITEMSIZE[tensor.dtype]
        storage = self.storage(where, tensor, size)
        skipped, nbytes = tensor.offset * size, math.prod(tensor.shape) * size
        if skipped + nbytes > storage.nbytes:
            raise SourceError(
                f"{where}: {nbytes} bytes from byte {storage.begin + skipped} on, but its storage from byte "
                f"{storage.begin} on has {storage.nbytes} and the file {self.path.stat().st_size}; the file is "
                "truncated or damaged."
            )
        return storage.begin + skipped, nbytes, storage

    def storage(self, where: str, tensor: Strided, size: int) -> Storage:
        """The place of a tensor's storage; raises unless its length is the one in the pickle."""
        told = tensor.storage.numel * (1 if tensor.storage.kind == "UntypedStorage" else size)
        storage = self.storages.get(tensor.storage.key)
        if storage is None or not storage.nbytes - size < told <= storage.nbytes:
            found = "is not there" if storage is None else f"has {storage.nbytes}"
            raise SourceError(
                f"{where}: its storage data/{tensor.storage.key[:40]} should have {told} bytes and {found}; the file "
                "is truncated or damaged."
            )
        return storage

    def mesh(self, where: str, record: Call) -> Mesh:
        """The device mesh of a tensor; it exposes renamed or copied files, which shards of equal size do not."""
        if (mesh := self.meshes.get(id(record))) is None:

            def values(name: str, tensor: Strided) -> list[int]:
                return self.integers(f"{name} of the device mesh of {where}", tensor)

            mesh = self.meshes[id(record)] = read_mesh(record, values, self.rank)
            if wrong := [writer for writer in mesh.writers if writer != self.rank]:
                raise SourceError(
                    f"{where}: it was written by rank {wrong[0]}, so the file has a wrong name. Copy the ranks' files "
                    "again."
                )
        return mesh

    def integers(self, where: str, tensor: Strided) -> list[int]:
        """The values of a small tensor with any strides."""
        code, size = _INTEGERS.get(tensor.dtype), ITEMSIZE.get(tensor.dtype, 8)
        count, storage = math.prod(tensor.shape), self.storage(where, tensor, size)
        if code is None or max(storage.nbytes, count * size) > BLOCK:
            raise SourceError(f"{where}: {storage.nbytes} bytes of {tensor.dtype}; no run has so many ranks.")
        (block,) = _blocks(self.path, storage.begin, storage.nbytes) if storage.nbytes else (b"",)
        cells = memoryview(block[: len(block) // size * size]).cast(code)
        return [
            cells[tensor.offset + sum(map(int.__mul__, unravel(number, tensor.shape), tensor.stride))]
            for number in range(count)
        ]


def local_box(
    fqn: str, shape: tuple[int, ...], mesh: torch.Tensor, placements: Sequence[Any], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Local shape and offsets, in elements, of `rank` under DTensor placements."""
    known = [p.dim if type(p) is ShardPlacement else None if isinstance(p, Replicate) else str(p) for p in placements]
    return _box(fqn, shape, Mesh(tuple(mesh.shape), tuple(mesh.flatten().tolist()), ()), known, rank)


def _box(fqn: str, shape: Index, mesh: Mesh, placements: Sequence[Placement], rank: int) -> tuple[Index, Index]:
    """`Shard(d)` splits like `torch.chunk`: each rank has ceil(size / n) rows, the last ranks fewer or none.

    Each mesh dimension splits the result of the ones before it.
    """
    where = mesh.coordinate(rank)
    if where is None:
        raise SourceError(f"{fqn}: rank {rank} is not in the tensor's device mesh {list(mesh.ranks[:64])}.")
    local, offsets = list(shape), [0] * len(shape)
    for coordinate, n, placement in zip(where, mesh.shape, placements, strict=True):
        if placement is None:
            continue
        if not isinstance(placement, int) or not 0 <= placement < len(shape):
            raise SourceError(
                f"{fqn}: placement {_show([placement])} is not supported; expected Shard(dim) or Replicate()."
            )
        step = -(-local[placement] // n)
        start = min(coordinate * step, local[placement])
        offsets[placement] += start
        local[placement] = min(step, local[placement] - start)
    return tuple(local), tuple(offsets)


def _show(placements: Sequence[Placement]) -> str:
    return ", ".join("R" if p is None else f"S({p})" if isinstance(p, int) else p for p in placements)


def _check_same_keys(directory: Path, ranks: Sequence[dict[str, Piece]]) -> None:
    everything = set().union(*ranks)
    for key in sorted(everything):
        if lacking := [r for r, pieces in enumerate(ranks) if key not in pieces]:
            having = [r for r in range(len(ranks)) if r not in set(lacking)]
            raise SourceError(
                f"{directory}: {key} is in the file of rank {brief(having)} but not in that of rank "
                f"{brief(lacking)} (world size {len(ranks)}). The files are of different models or saves."
            )


def _assemble(fqn: str, pieces: Sequence[Piece], files: Sequence[Path | Memory]) -> TensorEntry:
    first = pieces[0]
    for rank, piece in enumerate(pieces):
        if (piece.dtype, piece.shape, piece.offsets is None) != (first.dtype, first.shape, first.offsets is None):
            raise SourceError(
                f"{fqn}: rank 0 says {first.dtype} {list(first.shape)}, rank {rank} says {piece.dtype} "
                f"{list(piece.shape)}; the rank files are of different models, or hold rank-local tensors."
            )
    if first.offsets is None:
        _check_replicas(fqn, pieces, files)
        shards = [Shard(0, (0,) * len(first.shape), first.shape, 0, first.byte_offset)]
    else:
        unique: dict[Any, Shard] = {}  # replica groups (HSDP) have the same boxes: the lowest rank's copy is taken
        for rank, p in enumerate(pieces):
            assert p.offsets is not None  # like the first one's
            shard = Shard(rank, p.offsets, p.local_shape, rank, p.byte_offset)
            known = unique.setdefault((p.offsets, p.local_shape), shard)
            if pieces[known.rank].crc and p.crc and pieces[known.rank].crc != p.crc:
                raise SourceError(
                    f"{fqn}: ranks {known.rank} and {rank} are replicas and hold different values of "
                    f"{list(p.local_shape)} at {list(p.offsets)}: of different saves, or diverged in training."
                )
        shards = [s for s in unique.values() if math.prod(s.shape) or not math.prod(first.shape)]
    entry = TensorEntry(fqn, first.dtype, first.shape, join_runs(shards))
    check_coverage(entry)
    return entry


def _check_replicas(fqn: str, pieces: Sequence[Piece], files: Sequence[Path | Memory]) -> None:
    """A plain tensor must be the same on every rank; otherwise the ranks hold parts of an unrecorded layout."""
    if len({piece.crc for piece in pieces}) == 1 and pieces[0].crc:
        return  # the later reading compares it
    nbytes = math.prod(pieces[0].shape) * ITEMSIZE[pieces[0].dtype]
    everywhere = [_blocks(file, piece.byte_offset, nbytes) for file, piece in zip(files, pieces, strict=True)]
    for first, *others in zip(*everywhere, strict=True):
        if differ := [rank for rank, block in enumerate(others, 1) if block != first]:
            raise SourceError(
                f"{fqn}: a plain tensor with different values on rank 0 and rank {differ[0]}: each rank holds a "
                "part of its own and the layout is not recorded; such a checkpoint cannot be merged."
            )


def _blocks(file: Path | Memory, offset: int, nbytes: int) -> Iterator[bytes]:
    """`nbytes` from `offset` on, in blocks of BLOCK bytes."""
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        for start in range(offset, offset + nbytes, BLOCK):
            block = bytearray(min(BLOCK, offset + nbytes - start))
            if isinstance(opened, BufferedReader):
                opened.seek(start)
                opened.readinto(block)
            else:
                opened.read(memoryview(block), start, offset + nbytes)
            yield bytes(block)


def _backend(directory: Path) -> str:
    try:
        version = read_json(directory / "fsdp_config.json")["FSDP_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return "fsdp"
    return f"fsdp{version}" if isinstance(version, int) and 1 < version < 10 else "fsdp"

"""Hugging Face weights that verl wrote, as a source: every tensor is one whole shard, under its name on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.archive_records import Record, difference
from verl_autoexport.shards.checksums import Run
from verl_autoexport.shards.manifest import ITEMSIZE, ShardManifest
from verl_autoexport.shards.safetensors_files import INDEX_NAME, TORCH_DTYPE, manifest_of, read_header
from verl_autoexport.sources.fsdp.rank_files import CHANGED, runs_by_file
from verl_autoexport.sources.fsdp.same_save import doubts
from verl_autoexport.sources.hf_model.discovery import FOLDER, step_directory, weight_map, weight_paths
from verl_autoexport.sources.protocol import Leaf, SecondReading
from verl_autoexport.system.cpus import cores
from verl_autoexport.system.page_cache import drop_cache

BACKEND = "hf_model"
_UNCHECKED = (
    "the weights were read from the Hugging Face files of a checkpoint, which hold no checksums: only their size, time "
    "and headers, and a second reading, were compared"
)


class Mark(NamedTuple):
    """What identifies a file: its size and time, and a digest of its header, or of all of it if it is an index."""

    name: str
    nbytes: int
    time_ns: int
    header: str


class HfWeights:
    """The weights in `huggingface/` of a directory. Every method raises SourceError if they are damaged or gone."""

    kind = "checkpoint"

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.paths = weight_paths(self.directory)
        index = self.directory / FOLDER / INDEX_NAME
        self.index = index if index.is_file() else None
        self.marks = self._marks()

    @property
    def files(self) -> list[Path]:
        return [*self.paths, *([self.index] if self.index else [])]

    @property
    def fingerprint(self) -> str:
        return f"files-{hashlib.sha256(json.dumps(self.marks).encode()).hexdigest()[:32]}"

    def check_unchanged(self) -> None:
        """Raises if a file was rewritten; one that has the same size, time and header passes for the same."""
        if changed := [seen.name for seen, now in zip(self.marks, self._marks(), strict=True) if seen != now]:
            raise SourceError(f"{self.directory / FOLDER}: {', '.join(changed)} {CHANGED}")

    def manifest(self) -> ShardManifest:
        found = manifest_of(self.paths, self.fingerprint)
        if not found.tensors:
            raise SourceError(f"{self.paths[0]}: it holds no tensors; the save was interrupted.")
        self._check_whole(found)
        if self.index is not None:
            _check_index(self.index, self.paths, found)
        self.check_unchanged()  # everything comes from one save
        notes = (_UNCHECKED, *doubts(step_directory(self.directory), self.paths, self._called))
        noted = dict.fromkeys(range(len(self.paths)), ())  # so that the merge notes what it reads
        return replace(found, backend=BACKEND, records=noted, notes=notes, on_disk=True)

    def verify_checksums(self, manifest: ShardManifest, runs: Sequence[Run], progress: Callable[[int], None]) -> None:
        """Reads again what the merge has read; a file that changed in between, or is not read reliably, is refused."""
        by_file, ended = runs_by_file(runs), Event()
        with ThreadPoolExecutor(min(4, cores())) as pool:
            try:
                running = [pool.submit(_compare, self.paths[i], found, ended) for i, found in by_file.items()]
                for done in as_completed(running):
                    progress(done.result())
            finally:
                ended.set()

    def drop_cache(self) -> None:
        for path in self.paths:
            drop_cache(path)

    def _called(self, number: int) -> tuple[str, str]:
        name = self.paths[number].name
        return name, name

    def _marks(self) -> list[Mark]:
        return list(map(_mark, self.files))

    def _check_whole(self, found: ShardManifest) -> None:
        """Raises unless each file ends with its last tensor and is filled by tensors of known dtypes."""
        filled = dict.fromkeys(range(len(self.paths)), 0)
        for name, entry in found.tensors.items():
            (shard,) = entry.shards
            if entry.dtype not in ITEMSIZE:
                raise SourceError(f"{self.paths[shard.file]}: {name}: dtype {entry.dtype} is not supported.")
            filled[shard.file] += entry.nbytes
        for number, path in enumerate(self.paths):
            expected, size = 8 + read_header(path)[0] + filled[number], path.stat().st_size
            if size != expected:
                raise SourceError(f"{path}: {expected} bytes expected from its header, {size} found; it is damaged.")


def _mark(path: Path) -> Mark:
    try:
        seen = path.stat()
        if path.name == INDEX_NAME:
            content = path.read_bytes()
        else:
            length = read_header(path)[0]
            with path.open("rb") as file:
                content = file.read(8 + length)
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}; the checkpoint was removed while it was being used.") from e
    return Mark(path.name, seen.st_size, seen.st_mtime_ns, hashlib.sha256(content).hexdigest()[:32])


def _check_index(index: Path, paths: Sequence[Path], found: ShardManifest) -> None:
    """Raises unless index and files name the same tensors in the same places."""
    said = weight_map(index)
    held = {name: paths[entry.shards[0].file] for name, entry in found.tensors.items()}
    for name in sorted(said.keys() | held.keys()):
        if name not in held:
            raise SourceError(f"{index}: {name} should be in {said[name]}, which lacks it; the save is not complete.")
        if name not in said:
            raise SourceError(f"{index}: it lacks {name}, which is in {held[name]}; the files are of different saves.")
        if said[name] != held[name].name:
            raise SourceError(f"{index}: {name} should be in {said[name]}, but is in {held[name]}: of another save.")


def _compare(path: Path, runs: Sequence[Run], ended: Event) -> int:
    """Raises SourceError unless a file gives the bytes of `runs` once more; returns their number."""
    records = [Record(f"bytes {run.begin} to {run.end}", run.begin, run.end - run.begin, run.crc) for run in runs]
    if found := difference(path, records, (), lambda: not ended.is_set()):
        record, crc = found
        raise SourceError(
            f"{path}: {record.name}: CRC-32 {record.crc:08x} when they were exported, {crc:08x} when they were read "
            "again. A save overwrites the file, or the disk does not read it reliably; export the step again."
        )
    return sum(record.nbytes for record in records)


def read_again(directory: Path) -> SecondReading:
    """The weights as safetensors' own reader gives them."""
    from safetensors import safe_open

    tensors, empty = {}, {}
    for path in weight_paths(directory):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    dtype = getattr(torch, TORCH_DTYPE[part.get_dtype()])
                    empty[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                    tensors[name] = partial(_visit, path, name)
        except Exception as e:
            raise SourceError(f"{path}: safetensors cannot read it: {e!r:.300}") from e
    return SecondReading(tensors, empty)


def _visit(path: Path, name: str, target: torch.Tensor, leaf: Leaf) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        leaf(target, file.get_tensor(name))

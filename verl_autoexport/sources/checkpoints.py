"""Finding verl's FSDP checkpoints on disk: which rank files are there, which content they have. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.records import Mark, mark

RANK_FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
BLOCK = 1 << 20
"""Bytes read at a time where whole files or tensors are compared."""
Stat = tuple[str, int, int, int]
"""Name, inode, size and mtime (ns) of a file."""


def find_checkpoint(path: Path, role: str = "actor") -> Path:
    """The directory with the rank files: `path` itself, or `path/<role>` for a `global_step_N`.

    Raises SourceError naming what was looked for.
    """
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory; expected a verl checkpoint, `global_step_N` or its `{role}/`.")
    for candidate in (path, path / role):
        if candidate.is_dir() and any(RANK_FILE.fullmatch(p.name) for p in candidate.iterdir()):
            return candidate
    raise SourceError(
        f"{path}: no FSDP shards here or in {role}/: expected model_world_size_W_rank_R.pt. Either the step was "
        "rotated away, or checkpoint.save_contents did not include 'model', or the strategy is not fsdp/fsdp2."
    )


def rank_files(directory: Path) -> list[Path]:
    """The model files of all ranks, in order of rank; raises SourceError unless each is there exactly once."""
    world_size, files = present_ranks(directory)
    if not files:
        raise SourceError(f"{directory}: no model_world_size_W_rank_R.pt found; expected the shards of an FSDP model.")
    if missing := sorted(set(range(world_size)) - files.keys()):
        raise SourceError(
            f"{directory}: world size {world_size}, but the files of rank{'s' if len(missing) > 1 else ''} "
            f"{brief(missing)} are missing. If each node keeps its own, merge in the cluster (--ray-address)."
        )
    if extra := sorted(files.keys() - set(range(world_size))):
        raise SourceError(f"{directory}: ranks {brief(extra)} do not exist in world size {world_size}.")
    return [files[rank] for rank in range(world_size)]


def present_ranks(directory: Path) -> tuple[int, dict[int, Path]]:
    """World size, and the model files of those ranks that are here; 0 and none where there are none.

    Raises SourceError where files of several world sizes are mixed.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if match := RANK_FILE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    if len(found) > 1:
        raise SourceError(
            f"{directory}: shards of different world sizes are mixed: {sorted(found)}. Two runs wrote to the same "
            "step; remove the files of the older one."
        )
    return next(iter(found.items())) if found else (0, {})


def fingerprint(directory: Path) -> str:
    """Identity of the shards' content, wherever they are copied to."""
    return digest([mark(path) for path in rank_files(directory)])


def digest(marks: Sequence[Mark]) -> str:
    """A fingerprint of files, by what identifies their content."""
    return f"crc32-{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]}"


def earlier_fingerprint(directory: Path) -> str:
    """The fingerprint as holds of the first versions have it, of name, inode, size and mtime."""
    return hashlib.sha256(json.dumps(stats(rank_files(directory))).encode()).hexdigest()[:32]


def stats(paths: Sequence[Path]) -> list[Stat]:
    """Which files these are; raises SourceError where one is gone."""
    try:
        return [(p.name, s.st_ino, s.st_size, s.st_mtime_ns) for p in paths for s in (os.stat(p),)]
    except OSError as e:
        raise SourceError(f"{e.filename}: {e.strerror}; the checkpoint was removed while it was being used.") from e


def brief(ranks: Sequence[int]) -> str:
    """The numbers in a message."""
    return ", ".join(map(str, ranks[:16])) + (f", … ({len(ranks)} in all)" if len(ranks) > 16 else "")

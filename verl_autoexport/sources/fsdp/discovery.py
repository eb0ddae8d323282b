"""Finds verl's FSDP checkpoints on disk: the rank files that are there, and their fingerprint. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.archive_records import Mark
from verl_autoexport.system.untrusted import is_count, read_json

RANK_FILE = re.compile(r"model_world_size_(0|[1-9][0-9]{0,5})_rank_(0|[1-9][0-9]{0,5})\.pt")
STEP = re.compile(r"global_step_([0-9]{1,18})")
ROLES = ("actor", "policy", "critic")
"""Directories of a step that hold shards; `policy` is what SkyRL calls the actor."""
_TRACKERS = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt")
BLOCK = 1 << 20
"""Bytes per read when whole files or tensors are compared."""


def find_checkpoint(path: Path, role: str = "actor") -> Path:
    """The directory with the rank files: `path` itself, or `path/<role>` for a `global_step_N`.

    Raises SourceError naming the missing files, and the place where they may be.
    """
    names = _names(role)
    try:
        if not path.is_dir():
            raise SourceError(f"{path}: {absence(path)}; expected a verl checkpoint, `global_step_N` or its `{role}/`.")
        if has_shards(path):
            return path
        found = [path / name for name in names if has_shards(path / name)]
        if len(found) > 1:
            raise SourceError(f"{path}: {names[0]}/ and {names[1]}/ both hold shards; name one of them.")
        if found:
            return found[0]
        hint = _elsewhere(path)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}.") from e
    raise SourceError(
        f"{path}: no FSDP shards here or in {'/ or '.join(names)}/: expected model_world_size_W_rank_R.pt. "
        + (
            hint
            or "Either the step was rotated away, or checkpoint.save_contents did not include 'model', or the strategy "
            "is not fsdp/fsdp2 and verl saved no safetensors in huggingface/ or model/huggingface/."
        )
    )


def candidates(path: Path, role: str) -> list[Path]:
    """The places where the shards of a step's `role` may be."""
    return [path, *(path / name for name in _names(role))]


def _names(role: str) -> tuple[str, ...]:
    return ("actor", "policy") if role == "actor" else (role,)


def has_shards(path: Path) -> bool:
    """Whether rank files lie directly in `path`."""
    return path.is_dir() and any(RANK_FILE.fullmatch(name) for name in os.listdir(path))


def absence(path: Path) -> str:
    """The reason why there is no directory at `path`."""
    if not os.path.lexists(path):
        return "no such directory"
    return "not a directory" if path.exists() else f"a link to {os.readlink(path)}, which is not there"


def _elsewhere(path: Path) -> str:
    """A sentence that names the directory probably meant; empty if none is known."""
    if steps := sorted((int(match[1]), p) for p in path.iterdir() if (match := STEP.fullmatch(p.name)) and p.is_dir()):
        tracked = _tracked(path)
        latest = next((p for n, p in reversed(steps) if n == tracked), steps[-1][1])
        return f"It is a run's directory with the steps {brief([n for n, _ in steps])}: give one, such as {latest}."
    if roles := [path / role for role in ROLES if has_shards(path / role)]:
        return f"There are some in {roles[0]}."
    if above := [p for p in path.absolute().parents[:2] if has_shards(p)]:
        return f"There are some in {above[0]}."
    runs = sorted({p.parent for p in path.glob("*/global_step_*") if STEP.fullmatch(p.name)})
    return f"It holds runs: give a step of one, such as {runs[0] / 'global_step_N'}." if runs else ""


def _tracked(path: Path) -> int | None:
    """The step that the run noted as its latest."""
    for name in _TRACKERS:
        with suppress(OSError, ValueError):
            return int((path / name).read_text(encoding="utf-8"))
    return None


def rank_files(directory: Path) -> list[Path]:
    """The model files of all ranks, in order of rank; raises SourceError unless each exists exactly once."""
    world_size, files = present_ranks(directory)
    if not files:
        raise SourceError(f"{directory}: no model_world_size_W_rank_R.pt found; expected the shards of an FSDP model.")
    if missing := sorted(set(range(world_size)) - files.keys()):
        if len(sets := by_world_size(directory)) > 1:
            raise _mixed(directory, sets)
        raise SourceError(
            f"{directory}: world size {world_size}, but the files of rank{'s' if len(missing) > 1 else ''} "
            f"{brief(missing)} are missing. If each node keeps its own, merge in the cluster (--ray-address)."
        )
    if extra := sorted(files.keys() - set(range(world_size))):
        raise SourceError(f"{directory}: ranks {brief(extra)} do not exist in world size {world_size}.")
    return [files[rank] for rank in range(world_size)]


def present_ranks(directory: Path) -> tuple[int, dict[int, Path]]:
    """World size, and the model files of the ranks that are here; 0 and an empty dict if there are none.

    A run that resumed with another world size and saves the same step again leaves the older files there.
    `fsdp_config.json`, written with the newer files, decides between them; without its answer, SourceError.
    """
    found = by_world_size(directory)
    if len(found) > 1:
        named = saved_world_size(directory)
        if named not in found:
            raise _mixed(directory, found)
        return named, found[named]
    return next(iter(found.items())) if found else (0, {})


def notes(directory: Path) -> list[str]:
    """Notes about shards that are left out."""
    sizes = sorted(by_world_size(directory))
    if len(sizes) < 2:
        return []
    chosen = present_ranks(directory)[0]
    left = ", ".join(str(n) for n in sizes if n != chosen)
    return [f"shards of world size {left} lie beside those of {chosen}, which fsdp_config.json names, and are left out"]


def by_world_size(directory: Path) -> dict[int, dict[int, Path]]:
    """World size -> rank -> the model file in `directory`."""
    found: dict[int, dict[int, Path]] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if match := RANK_FILE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return found


def saved_world_size(directory: Path) -> int | None:
    """The world size in `fsdp_config.json`, None if it has none."""
    with suppress(OSError, ValueError):
        size = read_json(directory / "fsdp_config.json").get("world_size")
        return size if is_count(size) else None
    return None


def _mixed(directory: Path, found: Mapping[int, object]) -> SourceError:
    return SourceError(
        f"{directory}: shards of different world sizes are mixed: {sorted(found)}, and fsdp_config.json names no "
        "complete set of them. Two runs wrote to the same step; remove the files of the older one."
    )


def digest(marks: Sequence[Mark]) -> str:
    """A fingerprint of files, from the marks that identify their content."""
    return f"crc32-{hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]}"


def brief(ranks: Sequence[int]) -> str:
    """The numbers, shortened for a message."""
    return ", ".join(map(str, ranks[:16])) + (f", … ({len(ranks)} in all)" if len(ranks) > 16 else "")

"""The kind of a directory that a person names: a registry, a version, a checkpoint, or none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from verl_autoexport.errors import ConfigError, RegistryError
from verl_autoexport.registry import journal, lease, staging, state
from verl_autoexport.registry.record import RECORD
from verl_autoexport.registry.store import Registry
from verl_autoexport.registry.versions import names_like_versions
from verl_autoexport.sources.fsdp.discovery import ROLES, STEP, absence, has_shards
from verl_autoexport.sources.hf_model.discovery import holds_weights

_MARKS = (state.FILE, journal.NAME, lease.NAME, staging.NAME)
_LOOKED_AT = 200  # the most directories to search for a registry near a wrong path
_RUN = "a run's directory with its checkpoints"
_MODEL = ("config.json", "adapter_config.json")


def is_registry(path: Path) -> bool:
    """Whether a run, or an export by hand, has begun to publish in `path`."""
    return path.is_dir() and (_is_kept(path) or bool(names_like_versions(path)))


def _is_kept(path: Path) -> bool:
    """Whether `path` has a registry's records, whatever the names beside them."""
    return any(os.path.lexists(path / mark) for mark in _MARKS)


def existing_registry(root: Path) -> Registry:
    """The registry in `root`, which stays untouched; RegistryError says what is there instead, or near it."""
    try:
        if is_registry(root):
            return Registry(root)
        near = next((p for p in _near(root) if is_registry(p)), None)
        what = _what(root) or "not a registry" if root.is_dir() else absence(root)
    except OSError as e:
        raise RegistryError(f"{root}: cannot be read: {e.strerror}") from e
    looks = "a run's autoexport.output_dir, which holds registry.json, .journal.jsonl or versions such as v0001-step20"
    raise RegistryError(f"{root}: {what}; expected {looks}" + (f"; there is one in {near}" if near else ""))


def check_target(target: Path, option: str, base_model: str | None = None) -> None:
    """Raises ConfigError unless a new directory, or a registry, may be made at `target`, after links are resolved."""
    target = Path(os.path.realpath(target))
    base = os.path.realpath(os.path.expanduser(base_model)) if base_model else None
    for folder in (target, *target.parents):
        what = "the base model" if base and str(folder) == base and folder.is_dir() else _what(folder)
        if not what or what == _RUN:
            continue
        if folder == target and option == "--output":
            found = f"exists and is not empty: it is {what}; nothing is overwritten"
        else:
            found = f"is {'' if folder == target else f'in {folder}, which is '}{what}; nothing is written there"
        raise ConfigError(f"{option} {target}: {found}. Name another directory.")


def check_output(target: Path, base_model: str | None = None) -> None:
    """Checks a directory of its own as `check_target` does; it may not lie among a registry's versions either."""
    check_target(target, "--output", base_model)
    target = Path(os.path.realpath(target))
    inside = [folder for folder in target.parents if _is_kept(folder)]
    if _is_kept(target) or (inside and target.relative_to(inside[0]).parts[0].startswith(".")):
        root = target if _is_kept(target) else inside[0]
    elif inside and inside[0] == target.parent:
        root = target.parent
    else:
        return
    raise ConfigError(f"--output {target}: {root} is a registry; publish with --registry, or name another directory.")


def _what(path: Path) -> str:
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        return ""
    if (path / RECORD).is_file() and any((path / name).is_file() for name in _MODEL):
        return "an exported model"
    step = STEP.fullmatch(path.name)
    if has_shards(path) or (step and any(has_shards(path / role) or holds_weights(path, role) for role in ROLES)):
        return "a checkpoint"
    return _RUN if any(map(STEP.fullmatch, os.listdir(path))) else ""


def _near(root: Path) -> Iterator[Path]:
    """The places where the intended registry may be: below, above, or beside."""
    yield root / "exports"
    if root.is_dir():
        yield from islice((p for p in root.iterdir() if not p.name.startswith(".")), _LOOKED_AT)
    for folder in root.absolute().parents[:3]:
        yield from (folder, folder / "exports")

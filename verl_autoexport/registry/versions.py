"""Published versions on disk."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry.record import RECORD, ExportRecord, read_record_file

NAME = re.compile(r"v([0-9]{4,})-step([0-9]+)")
# Every name like a version's takes its number, so that no number is ever used twice.
LIKE_A_NAME = re.compile(r"v([0-9]+)-step([0-9]+)")


@dataclass(frozen=True)
class Version:
    """A published version. `superseded`: the run later resumed from an earlier step."""

    number: int
    step: int
    path: Path
    record: ExportRecord
    superseded: bool
    pinned: bool

    @property
    def name(self) -> str:
        return self.path.name


def version_name(number: int, step: int) -> str:
    return f"v{number:04d}-step{step}"


class Catalog:
    """The directories that look like versions. A record is read once, since it never changes after publication."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[Path, Any, ExportRecord | str]] = {}

    def scan(self, fresh: bool = True) -> tuple[list[tuple[Path, ExportRecord]], list[tuple[Path, str]]]:
        """The valid versions by number, and the paths that only look like versions, with the reason.

        `fresh` False trusts the earlier reading: the holder of the lock uses it right after one.
        """
        known: dict[str, tuple[Path, Any, ExportRecord | str]] = {}
        for name in names_like_versions(self.root):
            seen = self._known.get(name)
            if seen is None or fresh:
                path = seen[0] if seen else self.root / name
                mark = _mark(path)
                seen = seen if seen and mark is not None and seen[1] == mark else (path, mark, _look(path))
            known[name] = seen
        self._known = known
        valid = [(path, found) for path, _, found in known.values() if isinstance(found, ExportRecord)]
        invalid = [(path, found) for path, _, found in known.values() if isinstance(found, str)]
        return sorted(valid, key=lambda found: (found[1].version, found[1].step)), invalid


def _mark(path: Path) -> tuple[int, ...] | None:
    """The identity of a record file; None if there is none, or the directory may not be a version."""
    try:
        folder, info = os.lstat(path), os.stat(f"{path}/{RECORD}")
    except OSError:
        return None
    return (folder.st_ino, folder.st_mode, info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size)


def _look(path: Path) -> ExportRecord | str:
    try:
        return _read_version(path)
    except RegistryError as e:
        return str(e)


def names_like_versions(root: Path) -> list[str]:
    """Every name in `root` of the form v…-step…, valid or not; empty if there is no `root`."""
    try:
        return sorted(name for name in os.listdir(root) if LIKE_A_NAME.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise RegistryError(f"{root}: cannot be listed: {e}") from e


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _read_version(path: Path) -> ExportRecord:
    match = LIKE_A_NAME.fullmatch(path.name)
    if match is None:
        raise RegistryError(f"{path}: not a version's name")
    number, step = int(match[1]), int(match[2])
    if path.name != version_name(number, step):
        raise RegistryError(f"{path}: not a version's name, which would be {version_name(number, step)}")
    mode = _mode(path)
    if stat.S_ISLNK(mode):
        raise RegistryError(f"{path}: a link; a version is a directory of its own in {path.parent}")
    if not stat.S_ISDIR(mode):
        raise RegistryError(f"{path}: not a directory")
    record = read_record_file(path / RECORD)
    if (record.version, record.step) != (number, step):
        found = f"version {record.version}, step {record.step}"
        raise RegistryError(f"{path / RECORD}: expected version {number}, step {step} as in the name, found {found}")
    return record

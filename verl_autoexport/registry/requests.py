"""Requests for a milestone: a person puts one small file there for each, and the run takes it.

.requests/*.json      waiting
.requests.taken-X/    taken for one step, in one rename: training does not wait, however many there are
.requests.done-X/     exported, being deleted
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from verl_autoexport.errors import RegistryError
from verl_autoexport.system.durable_files import fsync_dir, write_json_atomic

NAME = ".requests"
_TAKEN, _DONE = ".taken-", ".done-"
_TRIES = 100
_ABANDONED_S = 60.0  # no writer of a request takes so long


def put(folder: Path, note: str | None) -> Path:
    now = datetime.now(timezone.utc)
    path = folder / f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.json"
    asked_by = {"host": socket.gethostname(), "pid": os.getpid(), "created_at": now.isoformat(timespec="seconds")}
    # Beside the folder, which the run may take at any moment; no concurrent `recover` removes this name.
    temp = folder.parent / f".request-{uuid.uuid4().hex[:8]}.new"
    try:
        write_json_atomic(temp, {"schema_version": 1, "note": note, **asked_by})
        for left in reversed(range(_TRIES)):
            try:
                folder.mkdir(exist_ok=True)
                os.replace(temp, path)
                break
            except (FileNotFoundError, FileExistsError):  # it was there, and was taken before the second look
                if not left:
                    raise
        with suppress(FileNotFoundError):
            fsync_dir(folder)
    except OSError as e:
        raise RegistryError(f"{path}: the request cannot be written: {e}") from e
    return path


def abandoned(root: Path) -> list[Path]:
    """The unfinished files of requests whose writers were killed."""
    found = []
    for path in root.glob(".request-*.new"):
        with suppress(FileNotFoundError):  # it has become a request
            found += [path] if time.time() - path.stat().st_mtime > _ABANDONED_S else []
    return found


def pending(folder: Path) -> list[Path]:
    """The requests without an export, oldest first: those waiting and those taken."""
    found: list[Path] = []
    for each in (*taken(folder), folder):
        try:
            found += [Path(each, n) for n in sorted(os.listdir(each)) if _is_request(n)]
        except FileNotFoundError:
            continue
        except OSError as e:
            raise RegistryError(f"{each}: requests cannot be listed: {e}") from e
    return found


def take(folder: Path) -> Path | None:
    """Takes all waiting requests, if any. Every training step calls this, so it looks only for the first one."""
    try:
        with os.scandir(folder) as entries:
            if not any(_is_request(entry.name) for entry in entries):
                return None
        away = folder.with_name(f"{folder.name}{_TAKEN}{uuid.uuid4().hex[:8]}")
        os.rename(folder, away)
        with suppress(OSError):  # the next request creates it too
            folder.mkdir(exist_ok=True)
        return away
    except FileNotFoundError:
        return None
    except OSError as e:
        raise RegistryError(f"{folder}: requests cannot be taken: {e}") from e


def taken(folder: Path) -> list[Path]:
    """The folders that were taken and have led to no export yet."""
    return _folders(folder, _TAKEN)


def finish(away: Path) -> Path:
    """Marks a taken folder as exported; returns the path to delete."""
    done = away.with_name(away.name.replace(_TAKEN, _DONE))
    try:
        os.rename(away, done)
    except OSError as e:
        raise RegistryError(f"{away}: requests cannot be marked as exported: {e}") from e
    return done


def done(folder: Path) -> list[Path]:
    """The folders that were exported and are not deleted yet."""
    return _folders(folder, _DONE)


def delete(finished: Path) -> None:
    shutil.rmtree(finished, ignore_errors=True)


def _folders(folder: Path, mark: str) -> list[Path]:
    try:
        names = os.listdir(folder.parent)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise RegistryError(f"{folder.parent}: requests cannot be listed: {e}") from e
    return [folder.parent / name for name in sorted(names) if name.startswith(f"{folder.name}{mark}")]


def _is_request(name: str) -> bool:
    return name.endswith(".json")


def clear(folder: Path, paths: Iterable[Path]) -> None:
    for path in map(Path, paths):
        if path.parent not in (folder, *taken(folder)):
            raise RegistryError(f"{path}: not a request of this registry; requests are files in {folder}")
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise RegistryError(f"{path}: the request cannot be removed: {e}") from e

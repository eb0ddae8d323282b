"""Directories being written, each with a lock beside it that ends with its writer."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, SoftFileLock

NAME = ".staging"
_SUFFIX = ".lock"
LockOf = Callable[[Path], BaseFileLock]


@dataclass(frozen=True)
class Staging:
    """A directory to write a version into; `release` gives up the claim to it, whatever the directory then contains."""

    path: Path
    lock: BaseFileLock

    @property
    def id(self) -> str:
        return self.path.name

    def release(self) -> None:
        if isinstance(self.lock, SoftFileLock):  # the file is the lock
            self.lock.release(force=True)
            return
        # Unlinked while still held: no other process creates a lock of this name.
        with suppress(OSError):
            os.unlink(self.lock.lock_file)
        self.lock.release(force=True)

    def remove(self) -> None:
        """Deletes the directory, if it still exists, and releases it; OSError if part of it cannot be deleted."""
        try:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.path)
        finally:
            self.release()


def create(folder: Path, label: str, lock: LockOf) -> Staging:
    """Creates a staging directory under the registry's lock, so that no `abandoned` sees it half made."""
    folder.mkdir(exist_ok=True)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", label).lstrip(".")[:100] or "export"
    path = folder / f"{label}-{uuid.uuid4().hex[:8]}"
    staging = Staging(path, lock(path))
    staging.lock.acquire(timeout=0)
    try:
        path.mkdir()
    except BaseException:
        staging.release()
        raise
    return staging


def abandoned(folder: Path, lock: LockOf) -> list[Staging]:
    """Takes over every staging directory whose writer is gone; the caller holds the registry's lock."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    names = {e.name for e in entries if e.is_dir(follow_symlinks=False)}
    names |= {e.name.removesuffix(_SUFFIX) for e in entries if e.name.endswith(_SUFFIX)}
    found = []
    for name in sorted(names):
        staging = Staging(folder / name, lock(folder / name))
        try:
            staging.lock.acquire(timeout=0)
        except OSError:  # held (a Timeout), or another user's
            continue
        found.append(staging)
    return found

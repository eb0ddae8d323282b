"""Requests for a milestone: one small file each, put there by a person, taken by the run."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry.files import write_json_atomic

NAME = ".requests"


def put(folder: Path, note: str | None) -> Path:
    now = datetime.now(timezone.utc)
    path = folder / f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.json"
    asked_by = {"host": socket.gethostname(), "pid": os.getpid(), "created_at": now.isoformat(timespec="seconds")}
    try:
        folder.mkdir(exist_ok=True)
        write_json_atomic(path, {"schema_version": 1, "note": note, **asked_by})
    except OSError as e:
        raise RegistryError(f"{path}: the request cannot be written: {e}") from e
    return path


def pending(folder: str) -> list[Path]:
    """The waiting requests, oldest first. Asked at every training step: one system call when there are none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise RegistryError(f"{folder}: requests cannot be listed: {e}") from e
    return [Path(folder, n) for n in sorted(names) if n.endswith(".json")]


def clear(folder: Path, paths: Iterable[Path]) -> None:
    for path in map(Path, paths):
        if path.parent != folder:
            raise RegistryError(f"{path}: not a request of this registry; requests are files in {folder}")
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise RegistryError(f"{path}: the request cannot be removed: {e}") from e

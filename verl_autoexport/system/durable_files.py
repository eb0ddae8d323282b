"""Atomic replacement of small JSON files, and durable bytes and names."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError

_TEMP = re.compile(r"\..+\.tmp-[0-9a-f]{8}")


def temp_path(path: Path) -> Path:
    """A free name beside `path` that `is_temp` recognises after a crash."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def is_temp(name: str) -> bool:
    return _TEMP.fullmatch(name) is not None


def to_json(data: Any, path: Path, **options: Any) -> bytes:
    """Strict JSON (a NaN or infinity becomes null); RegistryError names `path`, the file to be written."""
    try:
        text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, **options)
    except (TypeError, ValueError, RecursionError) as e:
        raise RegistryError(f"{path}: cannot be written as JSON: {e}") from e
    # A lone surrogate (undecodable bytes in a path) has no UTF-8; as \udcXX it is valid JSON and reads back the same.
    return text.encode("utf-8", "backslashreplace")


def write_json_atomic(path: Path, data: Any) -> None:
    """Replaces `path` by `data`; after a crash it has the old content or the new, never part of it."""
    raw = to_json(data, path, indent=2) + b"\n"
    temp = temp_path(path)
    try:
        with open(temp, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise
    fsync_dir(path.parent)


def is_full(error: OSError) -> bool:
    """Whether the disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync_dir(path: Path) -> None:
    """Makes the names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems refuse to sync a directory; their server orders the names itself.
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Makes every file and name under `root` durable, the deepest first."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, topdown=False, onerror=fail):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink() or not path.is_file():
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(folder))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

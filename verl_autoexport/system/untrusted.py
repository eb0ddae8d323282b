"""Small files and texts from untrusted writers; standard library only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeGuard

MAX_JSON_BYTES = 64 << 20


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r:.100} occurs twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError names the fault of the file, OSError the reason that it cannot be read."""
    # O_NONBLOCK: a FIFO of this name must not hang the reader.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        if info.st_size > MAX_JSON_BYTES:
            raise ValueError(f"{info.st_size} bytes, more than the {MAX_JSON_BYTES} that such a file may have")
        raw = file.read(MAX_JSON_BYTES + 1)
    return parse_json(raw)


def parse_json(raw: bytes, once: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`; `once` refuses repeated keys. ValueError names the fault."""
    try:
        data = json.loads(raw, object_pairs_hook=_each_once if once else None)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, found {type(data).__name__}")
    return data


def leads_out(path: Path, root: Path) -> bool:
    """Whether links on the way to `path` leave the directory `root`, which may itself be reached through links."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))  # handles circular links


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether `name` is a file name within its directory, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and len(name) < 256 and not {"/", "\\", "\0"} & {*name}


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

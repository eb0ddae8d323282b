"""The journal of an output directory: the requested exports, and their outcomes.

Each line is one JSON object that ends in a checksum over the bytes before it, so that a line cut short
by a crash, or damaged later, is skipped and reported instead of believed.
"""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.milestones.events import Milestone, Trigger, is_measured
from verl_autoexport.system.durable_files import fsync_dir, to_json
from verl_autoexport.system.untrusted import is_count

NAME = ".journal.jsonl"
OUTCOMES = ("published", "failed", "dropped")


def append(path: Path, event: str, fields: dict[str, Any]) -> None:
    """Adds one durable line; the caller holds the registry's lock."""
    append_all(path, [(event, fields)])


def append_all(path: Path, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Adds durable lines in one write; a crash may leave only the first of them. The caller holds the lock."""
    append_lines(path, encode(path, entries))


def append_lines(path: Path, lines: bytes) -> None:
    """Appends entries that `encode` prepared before the lock was taken."""
    fresh = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            lines = b"\n" + lines  # a torn last line must not swallow this one
        if os.write(fd, lines) != len(lines):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: only partly written", str(path))
        os.fsync(fd)
    finally:
        os.close(fd)
    if fresh:
        fsync_dir(path.parent)


def encode(path: Path, entries: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """The lines of these entries; messages name `path`."""
    return b"".join(_line(path, event, fields) for event, fields in entries)


def _line(path: Path, event: str, fields: dict[str, Any]) -> bytes:
    if clash := {"event", "crc32"} & fields.keys():
        raise RegistryError(f"{path}: a journal entry cannot have fields of its own called {sorted(clash)}")
    body = to_json({"event": event, "time": time.time(), **fields}, path, separators=(",", ":"))[:-1]
    return body + _end(body) + b"\n"


def _end(body: bytes) -> bytes:
    return b',"crc32":"%08x"}' % zlib.crc32(body)


_END = len(_end(b""))


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All valid entries in order, and one message for each skipped line."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as e:
        raise RegistryError(f"{path}: the journal cannot be read: {e}") from e
    entries, problems = [], []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line:
            continue
        entry = parse(line)
        if entry is None:
            problems.append(damage(path, number, line))
        else:
            entries.append(entry)
    return entries, problems


def damage(path: Path, number: int, line: bytes) -> str:
    return f"{path}:{number}: damaged journal line skipped ({len(line)} bytes)"


def parse(line: bytes) -> dict[str, Any] | None:
    """The entry in a line; None if the line is incomplete or damaged."""
    body, end = line[:-_END], line[-_END:]
    if end != _end(body):
        return None
    try:
        entry = json.loads(f"{body.decode()}}}")
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("event"), str) else None


@dataclass(frozen=True)
class Fate:
    """The journal's last status of a step; `entry` is the line that set it."""

    step: int
    time: float
    triggers: tuple[Trigger, ...]
    status: str = "pending"
    entry: dict[str, Any] = field(default_factory=dict)

    def milestone(self) -> Milestone:
        return Milestone(self.step, self.time, self.triggers, self.status)


def replay(entries: Iterable[dict[str, Any]]) -> dict[int, Fate]:
    """Step -> fate. A rollback cancels the earlier lines of later steps; otherwise a step's last line wins."""
    fates: dict[int, Fate] = {}
    for entry in entries:
        event = entry["event"]
        if event == "superseded" and is_count(resumed_at := entry.get("resumed_at")):
            fates = {step: fate for step, fate in fates.items() if step <= resumed_at}
        elif is_count(step := entry.get("step")) and event == "asked":
            fates[step] = Fate(step, seconds(entry, "time"), triggers(entry), entry=entry)
        elif is_count(step) and event in OUTCOMES:
            # An outcome keeps the time and triggers of its request, unless that line was lost.
            asked = fates.get(step) or Fate(step, seconds(entry, "time"), triggers(entry))
            fates[step] = Fate(step, asked.time, asked.triggers, event, entry)
    return fates


def seconds(entry: dict[str, Any], key: str) -> float:
    """The number under `key`; 0 if there is none."""
    value = entry.get(key)
    return float(value) if is_measured(value) else 0.0


def triggers(entry: dict[str, Any]) -> tuple[Trigger, ...]:
    """The valid triggers that an entry lists."""
    found = entry.get("triggers")
    return tuple(Trigger.from_dict(t) for t in found if isinstance(t, dict)) if isinstance(found, list) else ()

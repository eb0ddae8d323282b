"""Shortens a journal that has grown: lines that later ones made void are removed, damaged and unknown lines stay.

The new file is made beside the old one without the lock, and replaces it under the lock, with the lines added since.
A crash leaves either the old journal or the new one, whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import journal
from verl_autoexport.registry.history import past
from verl_autoexport.registry.journal_reader import WORTH, Notes
from verl_autoexport.registry.state import Facts, is_name
from verl_autoexport.system.durable_files import fsync_dir, temp_path
from verl_autoexport.system.untrusted import is_count

_REPORTS = 100  # the last ones, which describe the last runs
_PER_STEP = frozenset({"asked", *journal.OUTCOMES})

log = logging.getLogger(__name__)


def compact(notes: Notes, locked: Callable[[], AbstractContextManager[None]]) -> bool:
    """Whether the journal was worth shortening, and is now shorter. Errors are logged, and change nothing."""
    if notes.lines < notes.worth_a_look:
        return False
    path, temp = notes.path, temp_path(notes.path)
    if not _is_worth(notes, len(keep(notes.read()[0])), notes.lines):
        return False
    try:
        raw = path.read_bytes()
        raw = raw[: raw.rfind(b"\n") + 1]
        lines = [line for line in raw.split(b"\n") if line]
        entries = [journal.parse(line) for line in lines]
        kept = keep(entries)
        if not _is_worth(notes, len(kept), len(lines)) or not _same(entries, kept):
            return False
        inode = os.stat(path).st_ino
        with open(temp, "xb") as file:
            file.write(b"".join(lines[index] + b"\n" for index in kept))
            file.flush()
            os.fsync(file.fileno())
            with locked():
                with open(path, "rb") as now:
                    head = os.fstat(now.fileno())
                    if head.st_ino != inode or now.read(len(raw)) != raw:
                        return False  # another process was faster
                    file.write(now.read())
                file.flush()
                os.fsync(file.fileno())
                os.replace(temp, path)
                fsync_dir(path.parent)
        return True
    except (OSError, RegistryError) as e:
        log.warning("%s: keeps its length: %s", path, e)
        return False
    finally:
        with suppress(OSError):
            temp.unlink()


def _is_worth(notes: Notes, kept: int, lines: int) -> bool:
    notes.worth_a_look = max(2 * kept, kept + WORTH)
    return lines >= notes.worth_a_look


def keep(entries: Sequence[dict[str, Any] | None]) -> list[int]:
    """The indices of the lines that are not void, in order; None is a damaged line."""
    kept, seen, reports, standing = [], set(), 0, _standing(entries)
    for index in range(len(entries) - 1, -1, -1):  # the last line about something makes the earlier ones void
        entry, void = entries[index], False
        if entry is None:
            pass
        elif entry["event"] in _PER_STEP and is_count(entry.get("step")):
            void = index not in standing
        elif (key := _last_only(entry)) is not None:
            void = key in seen
            seen.add(key)
        elif entry["event"] == "report":
            reports += 1
            void = reports > _REPORTS
        if not void:
            kept.append(index)
    return kept[::-1]


def _standing(entries: Iterable[dict[str, Any] | None]) -> set[int]:
    """The indices of every publication, and of each step's first and last line that `replay` uses."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    published = set()
    for index, entry in enumerate(entries):
        if entry is None:
            continue
        event = entry["event"]
        if event == "superseded" and is_count(at := entry.get("resumed_at")):
            first = {step: i for step, i in first.items() if step <= at}
            last = {step: i for step, i in last.items() if step <= at}
        elif event in _PER_STEP and is_count(step := entry.get("step")):
            if event == "asked":
                first[step] = index
            else:
                first.setdefault(step, index)
            last[step] = index
            published |= {index} if event == "published" else set()
    return {*first.values(), *last.values(), *published}


def _last_only(entry: dict[str, Any]) -> tuple[str, str] | None:
    """The subject of an entry if only the last entry about it counts."""
    event = entry["event"]
    if event in ("pinned", "unpinned") and is_name(name := entry.get("version")):
        return "pin", name
    if event == "delete_failed" and isinstance(path := entry.get("path"), str):
        return event, path
    return None


def _same(entries: list[dict[str, Any] | None], kept: Iterable[int]) -> bool:
    """Whether the shortened journal gives the same answers to every question that is ever asked of it."""
    before = [e for e in entries if e is not None]
    after = [e for i in kept if (e := entries[i]) is not None]
    same = vars(Facts(before)) == vars(Facts(after)) and past(before) == past(after)
    if not (same := same and journal.replay(before) == journal.replay(after)):
        log.warning("the journal is not shortened: a shorter one would give other answers")
    return same

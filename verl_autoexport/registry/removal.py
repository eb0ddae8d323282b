"""Removes versions in the reverse order of publication: links first, then the record, then the data.

    journal `removed`        from here on it is no version, whatever files remain
    registry.json            informs readers while the name is taken
    export.json unlinked     informs those who read the directory itself
    renamed to .trash/…
    .trash/… deleted         the long part, without the lock
    journal `deleted`        the name is free

After a crash at any point `recover`, or the next removal, continues from there. A version in .trash that has a record
and that the journal does not know (perhaps because the journal was lost) is left to a person.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from verl_autoexport.registry import journal
from verl_autoexport.registry.history import Exported
from verl_autoexport.registry.journal_reader import Notes
from verl_autoexport.registry.record import RECORD
from verl_autoexport.registry.retention import Keep, Verdict
from verl_autoexport.registry.state import Facts, State, load
from verl_autoexport.system.durable_files import fsync_dir, is_full

TRASH = ".trash"
_TRIES = 20
_PORTION = 32  # versions taken out of sight before the lock is released for a moment


def note_lost(state: State, facts: Facts) -> list[str]:
    """Adds to `state` the removed versions that only the journal knows; returns their names."""
    known = set(state.removed)
    lost = [name for name in facts.removed if name not in known]
    state.removed += lost
    return lost


def sentence(notes: Notes, verdicts: Sequence[Verdict]) -> bytes:
    """The lines that `mark_removed` adds to the journal, prepared before the lock is taken."""
    return journal.encode(notes.path, [("removed", _fields(verdict)) for verdict in verdicts])


def mark_removed(root: Path, notes: Notes, state: State, verdicts: Sequence[Verdict], lines: bytes) -> int:
    """Notes in the journal and in `state` that these are no longer versions; the caller holds the lock.

    Returns their number: a full disk takes fewer, and the others follow once these are deleted.
    """
    before = len(state.removed)
    try:
        journal.append_lines(notes.path, lines)
    except OSError as e:
        if not is_full(e):
            raise
        _mark_some_removed(root, notes, verdicts)
    note_lost(state, notes.facts())
    _save(root, notes, state)
    return len(state.removed) - before


def _mark_some_removed(root: Path, notes: Notes, verdicts: Sequence[Verdict]) -> None:
    """Notes as many as there is room for, and at least the first."""
    noted = notes.facts().removed
    begun = any(verdict.version.name in noted for verdict in verdicts)
    for verdict in (v for v in verdicts if v.version.name not in noted):
        try:
            notes.append("removed", _fields(verdict))
        except OSError as e:
            if not is_full(e):
                raise
            if begun:
                return
            _make_room(root, notes, verdict)  # no room even for one line
            notes.append("removed", _fields(verdict))
        begun = True


def _save(root: Path, notes: Notes, state: State) -> None:
    """Writes a changed state for readers; a full disk stops nothing, since the journal already has the change."""
    if load(root, notes.facts) != (state, None):
        try:
            state.write(root)
        except OSError as e:
            if not is_full(e):
                raise


def _fields(verdict: Verdict) -> dict[str, Any]:
    version, exported = verdict.version, Exported.of(verdict.version)
    return {
        "step": version.step,
        "version": version.name,
        "reason": verdict.reason,
        "bytes": verdict.nbytes,
        "superseded": version.superseded,
        "triggers": exported.triggers,
        "created": exported.time,
        "fingerprint": exported.fingerprint,
    }


def _make_room(root: Path, notes: Notes, verdict: Verdict) -> None:
    """Deletes the data first; a crash in between loses only the reason, as long as the publication is on record."""
    name = verdict.version.name
    if name not in notes.facts().published:
        raise OSError(errno.ENOSPC, "no room to note the removal", str(notes.path))
    os.unlink(root / name / RECORD)
    (root / TRASH).mkdir(exist_ok=True)
    target = _in_trash(root, name)
    os.rename(root / name, target)
    _delete(target)


def withdraw(root: Path, names: Iterable[str]) -> dict[Path, str]:
    """Takes removed versions out of readers' sight; returns path -> reason for failures. The caller holds the lock."""
    failed = {}
    for path in filter(_is_there, (root / name for name in names)):
        try:
            with suppress(FileNotFoundError):
                os.unlink(path / RECORD)
            # If it cannot be renamed, it is deleted in place: without a record it is no version.
            with suppress(OSError):
                (root / TRASH).mkdir(exist_ok=True)
                os.rename(path, _in_trash(root, path.name))
        except OSError as e:
            failed[path] = _reason(e)
    return failed


def trash(root: Path) -> list[Path]:
    """The paths in `.trash`, by name."""
    try:
        return [root / TRASH / name for name in sorted(os.listdir(root / TRASH))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def strays(root: Path, gone: Container[str]) -> dict[Path, str]:
    """The complete versions in `.trash` whose removal the journal does not record, each with a message."""
    found = (p for p in trash(root) if _name_of(p) not in gone and os.path.lexists(p / RECORD))
    why = f"the journal does not know that it was removed, and it holds {RECORD}: move it back to {root}, or delete it"
    return dict.fromkeys(found, why)


def delete(root: Path, names: Iterable[str], skip: Container[Path]) -> dict[Path, str]:
    """Deletes the data of removed versions, without the lock; returns path -> reason for failures."""
    failed: dict[Path, str] = {}
    in_place = [root / name for name in names if _is_there(root / name)]
    for path in (p for p in (*trash(root), *in_place) if p not in skip):
        try:
            _delete(path)
        except OSError as e:
            failed[path] = _reason(e)
    return failed


def _name_of(path: Path) -> str:
    """The version's name that a directory in `.trash` had."""
    return path.name.rpartition("-")[0]


def _in_trash(root: Path, name: str) -> Path:
    return root / TRASH / f"{name}-{uuid.uuid4().hex[:8]}"


def _is_there(path: Path) -> bool:
    """Whether the directory itself is still there, and not something else in its place."""
    return path.is_dir() and not path.is_symlink()


def _delete(path: Path) -> None:
    for _ in range(_TRIES):  # another process may be deleting it too
        try:
            shutil.rmtree(path)
        except NotADirectoryError:
            os.unlink(path)
        except FileNotFoundError:
            pass
        if not os.path.lexists(path):
            return
    raise OSError(f"it is still there after {_TRIES} attempts")


def finish(root: Path, notes: Notes, state: State, failed: dict[Path, str]) -> list[str]:
    """Notes deletions and failures; returns the names that are free. The caller holds the lock."""
    lying = {_name_of(path) for path in trash(root)}
    free = [name for name in state.removed if name not in lying and not _is_there(root / name)]
    entries: list[tuple[str, dict[str, Any]]] = [("deleted", {"version": name}) for name in free]
    said = notes.facts().failures
    for path, reason in failed.items():
        if said.get(shown := str(path.relative_to(root))) != reason:  # noted once, however often the deletion is tried
            entries.append(("delete_failed", {"path": shown, "reason": reason}))
    if entries:
        notes.append_all(entries)
    done = set(free)
    state.removed = [name for name in state.removed if name not in done]
    _save(root, notes, state)
    return free


def _reason(error: OSError) -> str:
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def resume_removals(
    root: Path, notes: Notes, locked: Callable[[], AbstractContextManager[None]]
) -> tuple[list[str], list[str]]:
    """Continues every removal that was begun; returns a line for each that is done or not possible yet."""
    state = load(root, notes.facts)[0]
    note_lost(state, notes.facts())
    removed = state.removed
    failed: dict[Path, str] = {}
    for begin in range(0, len(removed), _PORTION):  # other processes get the lock in between
        with locked():
            facts = notes.facts()
            done = facts.gone.difference(facts.removed)
            failed |= withdraw(root, (name for name in removed[begin : begin + _PORTION] if name not in done))
    if removed and (root / TRASH).is_dir():  # no data is deleted before it is certainly out of sight
        fsync_dir(root / TRASH)
        fsync_dir(root)
    stray = strays(root, notes.facts().gone)
    failed |= delete(root, removed, skip=failed.keys() | stray.keys())  # may take long, so without the lock
    told = [f"{path}: left alone: {why}" for path, why in stray.items()]
    if not removed and not failed:
        return [], told
    with locked():
        state = load(root, notes.facts)[0]
        note_lost(state, notes.facts())
        free = finish(root, notes, state, failed)
    told += [f"{path}: removed, but its data cannot be deleted yet: {reason}" for path, reason in failed.items()]
    return [f"{root / name}: removed" for name in free], told


def note_policy(notes: Notes, keep: Keep) -> None:
    """Records the policy of a run if it differs from the last one; the caller holds the lock."""
    if (notes.facts().keep or Keep()) != keep:
        notes.append("keep", keep.to_dict())

"""Removing versions: the reverse of publication. Links first, then the record, then the data.

    journal `removed`        from here on it is no version, whatever else is still there
    registry.json            says so to readers, as long as the name is taken
    export.json unlinked     says so to whoever reads the directory itself
    renamed to .trash/…      the name is free
    journal `deleted`
    .trash/… deleted         the long part, without the lock

After a crash at any point `recover`, or the next removal, goes on from there.
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

from verl_autoexport.registry import journal, retention
from verl_autoexport.registry.files import fsync_dir, is_full
from verl_autoexport.registry.memory import Exported
from verl_autoexport.registry.retention import Keep, Verdict
from verl_autoexport.registry.state import State, from_journal, load
from verl_autoexport.registry.versions import RECORD

TRASH = ".trash"
_TRIES = 20


def note_lost(state: State, entries: Iterable[dict[str, Any]]) -> list[str]:
    """Takes into `state` what only the journal knows to be removed; returns those names."""
    lost = [name for name in from_journal(entries).removed if name not in state.removed]
    state.removed += lost
    return lost


def condemn(root: Path, log: Path, state: State, verdicts: Sequence[Verdict]) -> None:
    """Notes in the journal, and in `state`, that these are no versions any more; the caller holds the lock.

    On a full disk fewer are noted, the others' turn comes when these are gone.
    """
    for verdict in verdicts:
        try:
            _note(log, verdict)
        except OSError as e:
            if not is_full(e):
                raise
            if verdict is not verdicts[0]:
                break
            _make_room(root, log, verdict)  # not even for one line is there any
            _note(log, verdict)
        state.removed.append(verdict.version.name)
    _save(root, state)


def _save(root: Path, state: State) -> None:
    """Tells readers, where there is something new; a full disk stops nothing, since the journal knows it already."""
    if load(root) != (state, None):
        try:
            state.write(root)
        except OSError as e:
            if not is_full(e):
                raise


def _note(log: Path, verdict: Verdict) -> None:
    version, exported = verdict.version, Exported.of(verdict.version)
    fields = {
        "step": version.step,
        "version": version.name,
        "reason": verdict.reason,
        "bytes": verdict.nbytes,
        "superseded": version.superseded,
        "triggers": exported.triggers,
        "created": exported.time,
        "fingerprint": exported.fingerprint,
    }
    journal.append(log, "removed", fields)


def _make_room(root: Path, log: Path, verdict: Verdict) -> None:
    """The data first, for once; a crash in between loses only the reason, as long as the publication is on record."""
    name = verdict.version.name
    if not any(e["event"] == "published" and e.get("version") == name for e in journal.read(log)[0]):
        raise OSError(errno.ENOSPC, "no room to note what is removed", str(log))
    (root / TRASH).mkdir(exist_ok=True)
    target = _in_trash(root, name)
    os.rename(root / name, target)
    _delete(target)


def withdraw(root: Path, names: Iterable[str]) -> dict[Path, str]:
    """Takes the removed versions out of readers' sight; path -> reason where that failed. The caller holds the lock."""
    failed = {}
    for path in filter(_is_there, (root / name for name in names)):
        try:
            with suppress(FileNotFoundError):
                os.unlink(path / RECORD)
                fsync_dir(path)
            # Where it cannot be renamed, it is deleted in its place: without a record it is no version.
            with suppress(OSError):
                (root / TRASH).mkdir(exist_ok=True)
                os.rename(path, _in_trash(root, path.name))
                fsync_dir(root)
        except OSError as e:
            failed[path] = _reason(e)
    return failed


def delete(root: Path, names: Iterable[str], skip: Container[Path]) -> dict[Path, str]:
    """Deletes the data of removed versions, without the lock; path -> reason where that failed."""
    failed: dict[Path, str] = {}
    in_trash = [root / TRASH / name for name in sorted(os.listdir(root / TRASH))] if (root / TRASH).is_dir() else []
    in_place = [root / name for name in names if _is_there(root / name)]
    for path in (p for p in (*in_trash, *in_place) if p not in skip):
        try:
            _delete(path)
        except OSError as e:
            failed[path] = _reason(e)
    return failed


def _in_trash(root: Path, name: str) -> Path:
    return root / TRASH / f"{name}-{uuid.uuid4().hex[:8]}"


def _is_there(path: Path) -> bool:
    """Whether the directory is still there, and not something else in its place."""
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


def settle(root: Path, log: Path, state: State, failed: dict[Path, str]) -> list[str]:
    """Notes what is gone and what could not be deleted; returns the names that are free. The caller holds the lock."""
    entries = journal.read(log)[0]
    free = [name for name in state.removed if not _is_there(root / name)]
    for name in free:
        journal.append(log, "deleted", {"version": name})
    state.removed = [name for name in state.removed if name not in free]
    said = {e.get("path"): e.get("reason") for e in entries if e["event"] == "delete_failed"}
    for path, reason in failed.items():
        if said.get(shown := str(path.relative_to(root))) != reason:  # once, however often it is tried
            journal.append(log, "delete_failed", {"path": shown, "reason": reason})
    _save(root, state)
    return free


def _reason(error: OSError) -> str:
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def go_on(root: Path, log: Path, locked: Callable[[], AbstractContextManager[None]]) -> tuple[list[str], list[str]]:
    """Goes on with every removal that was begun; returns a line for each that is done, and that cannot be yet."""
    with locked():
        state = load(root)[0]
        note_lost(state, journal.read(log)[0])
        failed = withdraw(root, removed := state.removed)
    failed |= delete(root, removed, skip=failed)  # may take long, so not under the lock
    if not removed and not failed:
        return [], []
    with locked():
        state = load(root)[0]
        note_lost(state, journal.read(log)[0])
        free = settle(root, log, state, failed)
    return (
        [f"{root / name}: removed" for name in free],
        [f"{path}: removed, but its data cannot be deleted yet: {reason}" for path, reason in failed.items()],
    )


def note_policy(log: Path, keep: Keep) -> None:
    """Records the policy of a run, if it is another than before; the caller holds the lock."""
    if (noted_policy(journal.read(log)[0]) or Keep()) != keep:
        journal.append(log, "keep", keep.to_dict())


def noted_policy(entries: Sequence[dict[str, Any]]) -> Keep | None:
    """The policy that a run recorded last."""
    for entry in reversed(entries):
        if entry["event"] == "keep":
            with suppress(ValueError):
                return retention.from_dict(entry)
    return None

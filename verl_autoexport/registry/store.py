"""The output directory: versions go in whole or not at all, and are found again.

    ROOT/v0001-step2/        a published version: a model directory plus its export.json
    ROOT/latest, best…       relative links to versions
    ROOT/registry.json       what may change: pointers, pins, superseded versions
    ROOT/.staging/<id>/      being written, while <id>.lock beside it is held
    ROOT/.trash/<id>/        removed, being deleted
    ROOT/.journal.jsonl      what was asked and what became of it, append-only
    ROOT/.requests/*.json    requests for a milestone
    ROOT/.owner.json         the run that exports here
    ROOT/.lock               held for short critical sections

Whatever moment a writer dies at, readers see whole versions only; `recover` repairs the rest.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from verl_autoexport.errors import RegistryError
from verl_autoexport.events import ExportRecord, Milestone
from verl_autoexport.registry import journal, lease, pointers, removal, requests, retention, staging
from verl_autoexport.registry import state as states
from verl_autoexport.registry.files import fsync_dir, fsync_tree, is_temp, temp_path, write_json_atomic
from verl_autoexport.registry.lease import Lease, Owner
from verl_autoexport.registry.memory import Exported, Memory
from verl_autoexport.registry.retention import Judgement, Keep
from verl_autoexport.registry.staging import Staging
from verl_autoexport.registry.state import State
from verl_autoexport.registry.versions import (
    LIKE_A_NAME,
    RECORD,
    Version,
    names_like_versions,
    read_record,
    scan,
    version_name,
)

__all__ = ["Registry", "Staging", "Version", "read_record", "write_json_atomic"]

LOCK_TIMEOUT_S = 60
_AT_ONCE = 8  # versions removed before the lock is given up for a moment

log = logging.getLogger(__name__)


class Registry:
    """The versions in one output directory. Building it touches nothing; reading never writes or locks.

    With `owner`, the token of a run's lease, every change is refused once another run has taken that over.
    """

    def __init__(self, root: Path | str, lock_timeout_s: float = LOCK_TIMEOUT_S, owner: str | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self._staging = self.root / staging.NAME
        self._requests = self.root / requests.NAME
        self._journal = self.root / journal.NAME
        self._lock = FileLock(self.root / ".lock")
        self._lock_timeout_s = lock_timeout_s
        self._owner = owner

    @classmethod
    def create(cls, root: Path | str, lock_timeout_s: float = LOCK_TIMEOUT_S, owner: str | None = None) -> Registry:
        """The registry in `root`, made if need be; RegistryError if it cannot be written to and locked."""
        registry = cls(root, lock_timeout_s, owner)
        try:
            for folder in (registry.root, registry._staging, registry._requests, registry.root / removal.TRASH):
                folder.mkdir(parents=True, exist_ok=True)
            probe = temp_path(registry.root / "probe")
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may be in `recover`
        except OSError as e:
            raise RegistryError(f"{registry.root}: cannot be the output directory, it is not writable: {e}") from e
        with registry._locked():
            return registry

    # -- reading ---------------------------------------------------------------------------

    def versions(self) -> list[Version]:
        """All published versions by number, superseded ones included."""
        return self._versions(states.load(self.root)[0])

    def invalid(self) -> list[tuple[Path, str]]:
        """What has a version's name but is none, and why."""
        found = scan(self.root)[1]
        removed = states.load(self.root)[0].removed  # asked later: a removal notes itself before it begins
        return [(path, why) for path, why in found if path.name not in removed and os.path.lexists(path)]

    def pointers(self) -> dict[str, str]:
        """What `latest`, `best`… mean: pointer -> directory name."""
        return pointers.choose(self.versions())

    def find(self, spec: str) -> Version:
        """The version called `v0001-step2`, `v1`, `1`, `step2` (its newest), `latest`, `best` or `best-NAME`."""
        self._check_root()
        versions = self.versions()
        found = pointers.matching(versions, spec)
        if len(found) > 1:
            names = ", ".join(v.name for v in found)
            raise RegistryError(f"{self.root}: {spec!r} means several versions: {names}; give the full name")
        if not found:
            raise RegistryError(self._not_found(spec, versions))
        return found[0]

    def journal_entries(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The journal's sound entries in order, and a message for every damaged line."""
        return journal.read(self._journal)

    def milestones(self, up_to_step: int | None = None) -> list[Milestone]:
        """What the triggers must remember, by step: published, pending, failed and dropped milestones.

        What a rollback cancelled is left out. A published version since removed or deleted stays in.
        """
        told = self._memory().milestones()
        return [m for m in told if up_to_step is None or m.step <= up_to_step]

    def exported(self) -> list[Exported]:
        """What was published and no rollback cancelled, by number, removed versions included."""
        return self._memory().exported()

    def outcomes(self) -> list[dict[str, Any]]:
        """The journal entries, with their triggers, of failed and dropped milestones not published since."""
        return self._memory().outcomes()

    def judge(self, keep: Keep) -> Judgement:
        """What `prune` would remove, and why."""
        return retention.judge(self.versions(), keep, pointers.links(self.root))

    def noted_policy(self) -> Keep | None:
        """The policy of the run that exports here, if one recorded it."""
        return removal.noted_policy(self.journal_entries()[0])

    # -- writing ---------------------------------------------------------------------------

    def own(self, run: str) -> Lease:
        """Makes `run` the one that exports here, until this process ends; RegistryError names one that lives."""
        taken = lease.take(self.root, run, self._locked)
        self._owner = taken.token
        return taken

    def owner(self) -> Owner | None:
        """The run that exports here now, as far as can be told at once."""
        return lease.living(self.root, wait_s=0, stale_s=0)

    def check_free(self) -> None:
        """Raises RegistryError, naming it, where another run exports that does not end within a moment."""
        if owner := lease.living(self.root):
            raise lease.refuse(self.root, owner)

    def check_owner(self) -> None:
        """Raises RegistryError once another run has taken over from the one that this registry belongs to."""
        if self._owner is not None:
            lease.check(self.root, self._owner)

    def stage(self, label: str) -> Staging:
        """A new directory to write a version into, ours until it is published, discarded or this process dies."""
        with self._locked():
            return staging.create(self._staging, label)

    def discard(self, staged: Staging) -> None:
        """Deletes a staging directory and gives it up; nothing is left to do where it was published or discarded."""
        self._check_own(staged, there=False)
        try:
            staged.remove()
        except OSError as e:
            raise RegistryError(f"{staged.path}: cannot be deleted: {e}") from e

    def publish(self, staged: Staging, record: ExportRecord, begin: Callable[[], None] = lambda: None) -> Version:
        """Makes a staged directory the next version; `record` is written into it, with its number, as the last file.

        RegistryError means that nothing was published, and the staging directory is still the
        caller's. `begin` is called when nothing is visible yet and the lock is held; it may raise.
        """
        self._check_own(staged)
        started = time.monotonic()
        try:
            fsync_tree(staged.path)  # the long part, so not under the lock
        except OSError as e:
            raise RegistryError(f"{staged.path}: cannot be made durable: {e}") from e
        with self._locked():
            begin()
            number = self._next_number(states.load(self.root)[0])
            timings = {**record.timings_s, "publish": round(time.monotonic() - started, 4)}
            version = self._rename(staged, replace(record, version=number, timings_s=timings))
            try:
                self._book(version)
            except (OSError, RegistryError) as e:
                # The version is there and whole: calling it failed would be wrong, and `recover` does the rest.
                log.warning("%s is published, but not all was noted: %s; the next start repairs it", version.path, e)
        staged.release()
        return version

    def refresh_pointers(self) -> list[str]:
        """Makes the links and `registry.json` say what the versions give rise to; returns warnings."""
        with self._locked():
            return self._settle(states.load(self.root)[0])[1]

    def supersede_after(self, step: int) -> list[Version]:
        """Notes that the run was resumed at `step`; returns the versions that a later, now abandoned, past had made."""
        with self._locked():
            known = self._memory()
            if known.latest_step() <= step:
                return []
            state, gone = known.state, [v for v in known.versions if not v.superseded and v.step > step]
            at = datetime.now(timezone.utc).isoformat(timespec="seconds")
            entry = {"resumed_at": step, "versions": [v.name for v in gone], "at": at}
            journal.append(self._journal, "superseded", entry)
            states.supersede(state, entry)
            self._settle_logged(state)
            return [replace(v, superseded=True) for v in gone]

    def pin(self, version: Version | str) -> Version:
        """Keeps `version` from being pruned."""
        return self._set_pin(version, True)

    def unpin(self, version: Version | str) -> Version:
        """Takes a pin back."""
        return self._set_pin(version, False)

    def note_policy(self, keep: Keep) -> None:
        """Records the policy of a run, for whoever prunes by hand."""
        with self._locked():
            removal.note_policy(self._journal, keep)

    def prune(self, keep: Keep) -> tuple[Judgement, list[str]]:
        """Removes what `keep` does not keep, and tries again what could not be deleted before.

        Returns the judgement and a line for every directory that cannot be deleted yet; that stops nothing else.
        """
        first, batch = None, True
        while batch:
            with self._locked():
                state = states.load(self.root)[0]
                removal.note_lost(state, self.journal_entries()[0])
                self._settle_logged(state)  # links first: none may lead to what goes
                judgement = retention.judge(self._versions(state), keep, pointers.links(self.root))
                first, batch = first or judgement, judgement.removed[:_AT_ONCE]
                removal.condemn(self.root, self._journal, state, batch)
            failed = removal.go_on(self.root, self._journal, self._locked)[1]
        return first, failed

    def journal(self, event: str, **fields: Any) -> None:
        """Adds a durable entry; `time` is now unless given. Asked, failed, dropped… need a `step`."""
        with self._locked():
            journal.append(self._journal, event, fields)

    def request(self, note: str | None = None) -> Path:
        """Asks the run that exports here for a milestone at its next step."""
        self._check_root()
        return requests.put(self._requests, note)

    def pending_requests(self) -> list[Path]:
        return requests.pending(self._requests)

    def clear_requests(self, paths: Iterable[Path]) -> None:
        requests.clear(self._requests, paths)

    def recover(self) -> list[str]:
        """Repairs what a killed process left; returns a line for each thing done, or that needs a person."""
        with self._locked():
            abandoned = staging.abandoned(self._staging)
            done = self._repair()
        for lines in removal.go_on(self.root, self._journal, self._locked):
            done += lines
        for staged in abandoned:  # deleting may take long, so not under the lock
            line = [f"{staged.path}: removed, its writer is gone"] if staged.path.is_dir() else []
            try:
                staged.remove()
                done += line
            except OSError as e:
                done.append(f"{staged.path}: its writer is gone, but it cannot be removed: {e}")
        return done

    # -- inside ----------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._check_root()
        try:
            self._lock.acquire(timeout=self._lock_timeout_s, poll_interval=0.01)
        except Timeout:
            held = f"{self._lock.lock_file}: held by another process for more than {self._lock_timeout_s:g} s"
            raise RegistryError(f"{held}; find it (`fuser` names it) and end it if it hangs") from None
        except OSError as e:
            raise RegistryError(f"{self._lock.lock_file}: cannot be locked: {e}") from e
        try:
            self.check_owner()
            yield
        except OSError as e:
            raise RegistryError(f"{self.root}: cannot be changed: {e}; are there space and permission?") from e
        finally:
            self._lock.release()

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise RegistryError(f"{self.root}: no such directory; expected the output_dir of a run")

    def _check_own(self, staged: Staging, there: bool = True) -> None:
        if staged.path.parent != self._staging or (there and not staged.path.is_dir()):
            raise RegistryError(f"{staged.path}: not a staging directory in {self._staging}")

    def _versions(self, state: State) -> list[Version]:
        return [
            Version(record.version, record.step, path, record, path.name in state.superseded, path.name in state.pins)
            for path, record in scan(self.root)[0]
            if path.name not in state.removed
        ]

    def _next_number(self, state: State) -> int:
        taken = [int(LIKE_A_NAME.fullmatch(name)[1]) for name in names_like_versions(self.root)]
        noted = states.from_journal(self.journal_entries()[0]).next_version
        return max(state.next_version, noted, 1 + max(taken, default=0))

    def _rename(self, staged: Staging, record: ExportRecord) -> Version:
        target = self.root / version_name(record.version, record.step)
        write_json_atomic(staged.path / RECORD, record.to_dict())
        record = read_record(staged.path / RECORD)
        if os.path.lexists(target):  # rename would silently replace an empty directory
            raise RegistryError(f"{target}: already there, and a version is never overwritten; move it away")
        os.rename(staged.path, target)
        return Version(record.version, record.step, target, record, superseded=False, pinned=False)

    def _book(self, version: Version) -> None:
        fsync_dir(self.root)
        fsync_dir(self._staging)
        self._note_published(version)
        state = states.load(self.root)[0]
        state.next_version = version.number + 1
        self._settle_logged(state)

    def _note_published(self, version: Version) -> None:
        fields = {"step": version.step, "version": version.name, "triggers": version.record.triggers}
        journal.append(self._journal, "published", fields)

    def _settle(self, state: State) -> tuple[list[str], list[str]]:
        """Writes `state`, then the links; both follow from the versions. Returns changes and warnings."""
        state.pointers = pointers.choose(self._versions(state))
        if states.load(self.root) != (state, None):
            state.write(self.root)
        return pointers.link(self.root, state.pointers)

    def _settle_logged(self, state: State) -> None:
        for warning in self._settle(state)[1]:
            log.warning("%s", warning)

    def _set_pin(self, version: Version | str, pinned: bool) -> Version:
        with self._locked():
            found = self.find(version if isinstance(version, str) else version.name)
            state = states.load(self.root)[0]
            if found.pinned != pinned:
                journal.append(self._journal, "pinned" if pinned else "unpinned", {"version": found.name})
                (state.pins.append if pinned else state.pins.remove)(found.name)
                state.write(self.root)
            return replace(found, pinned=pinned)

    def _memory(self) -> Memory:
        state = states.load(self.root)[0]
        versions = self._versions(state)  # before the journal, which knows what is removed meanwhile
        return Memory(state, self.journal_entries()[0], versions)

    def _repair(self) -> list[str]:
        done = []
        for name in filter(is_temp, sorted(os.listdir(self.root))):
            os.unlink(self.root / name)
            done.append(f"{self.root / name}: removed, left by a killed process")
        state, problem = states.load(self.root)
        entries = self.journal_entries()[0]
        for name, mark in states.from_journal(entries).superseded.items():
            if state.superseded.setdefault(name, mark) is mark and not problem:
                done.append(f"{self.root / name}: marked superseded, as the journal says")
        for name in removal.note_lost(state, entries):
            if not problem and (self.root / name).exists():
                done.append(f"{self.root / name}: was removed, as the journal says")
        versions = self._versions(state)
        noted = {entry.get("version") for entry in entries if entry["event"] == "published"}
        for version in (v for v in versions if v.name not in noted):
            self._note_published(version)
            done.append(f"{version.path}: its publication was missing in the journal, and is there now")
        if problem and (entries or versions):
            done.append(f"{problem}; rebuilt from the versions and the journal")
        state.next_version = self._next_number(state)
        changed, warnings = self._settle(state)
        return done + changed + warnings

    def _not_found(self, spec: str, versions: list[Version]) -> str:
        for path, reason in self.invalid():
            if path.name == spec:
                return f"{path} is no valid version: {reason}"
        return f"{self.root}: no version {spec!r:.200}; there is {pointers.listing(versions)}"

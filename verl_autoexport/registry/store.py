"""The output directory: each version is published whole or not at all, and can be found again.

    ROOT/v0001-step2/        a published version: a model directory plus its export.json
    ROOT/latest, best…       relative links to versions
    ROOT/registry.json       the changeable facts: pointers, pins, superseded versions
    ROOT/.staging/<id>/      being written, while <id>.lock beside it is held
    ROOT/.trash/<id>/        removed, being deleted
    ROOT/.journal.jsonl      the requested exports and their outcomes, append-only
    ROOT/.requests/*.json    requests for a milestone
    ROOT/.owner.json         the run that exports here
    ROOT/.lock               held for short critical sections

Whenever a writer dies, readers see whole versions only; `recover` repairs the rest.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import compaction, lease, pointers, removal, requests, retention, staging
from verl_autoexport.registry import state as states
from verl_autoexport.registry.lease import Lease, Owner
from verl_autoexport.registry.lock import RootLock
from verl_autoexport.registry.reading import Reader
from verl_autoexport.registry.record import RECORD, ExportRecord, read_record
from verl_autoexport.registry.retention import Keep, RetentionPlan
from verl_autoexport.registry.staging import Staging
from verl_autoexport.registry.state import State
from verl_autoexport.registry.versions import Version, names_like_versions, version_name
from verl_autoexport.system.durable_files import fsync_dir, fsync_tree, is_temp, temp_path, write_json_atomic

__all__ = ["Registry", "Staging", "Version", "read_record", "write_json_atomic"]

LOCK_TIMEOUT_S = 60
_TRIES = 4  # attempts to judge without the lock, before judging under it

log = logging.getLogger(__name__)


class Registry(Reader):
    """The versions in one output directory. The constructor touches nothing; reading never writes or locks.

    With `owner`, the token of a run's lease, every change is refused once another run has the lease. Slow
    work (reading records and the journal, deleting) happens while the lock is not held.
    """

    def __init__(self, root: Path | str, lock_timeout_s: float | None = None, owner: str | None = None) -> None:
        super().__init__(root)
        self._staging = self.root / staging.NAME
        self._requests = self.root / requests.NAME
        self._lock = RootLock(self.root)
        self.lock_timeout_s = LOCK_TIMEOUT_S if lock_timeout_s is None else lock_timeout_s
        self._owner = owner

    @classmethod
    def create(cls, root: Path | str, lock_timeout_s: float | None = None, owner: str | None = None) -> Registry:
        """The registry in `root`, created if needed; RegistryError if it cannot be written to and locked."""
        registry = cls(root, lock_timeout_s, owner)
        try:
            for folder in (registry.root, registry._staging, registry._requests, registry.root / removal.TRASH):
                folder.mkdir(parents=True, exist_ok=True)
            probe = temp_path(registry.root / "probe")
            probe.touch()
            probe.unlink(missing_ok=True)  # a concurrent `recover` may have removed it
        except OSError as e:
            raise RegistryError(f"{registry.root}: cannot be the output directory, it is not writable: {e}") from e
        with registry._locked(check=False):
            return registry

    # -- writing ---------------------------------------------------------------------------

    def own(self, run: str) -> Lease:
        """Makes `run` the owner of the directory until this process ends; RegistryError names a living owner."""
        taken = lease.take(self.root, run, partial(self._locked, check=False))
        self._owner = taken.token
        return taken

    def owner(self) -> Owner | None:
        """The run that exports here now, as far as this process can see without waiting."""
        return lease.living(self.root, wait_s=0, stale_s=0)

    def check_free(self) -> None:
        """Raises RegistryError, with the run's name, if another run exports here and does not end within a moment."""
        if owner := lease.living(self.root):
            raise lease.refuse(self.root, owner)

    def check_owner(self) -> None:
        """Raises RegistryError once another run has taken over from the owner of this registry.

        Without working locks it also raises for a process that belongs to no run, while a run is alive.
        """
        if self._owner is not None:
            lease.check(self.root, self._owner)
        elif self._lock.flaw is not None and (owner := lease.may_live(self.root)):
            raise RegistryError(
                f"{self.root}: {owner} exports here, and the locks of this file system do not work "
                f"({self._lock.flaw}), so nothing else may write: wait until that run has ended."
            )

    def stage(self, label: str) -> Staging:
        """A new directory to write a version into; it is ours until it is published, discarded or this process dies."""
        with self._locked():
            return staging.create(self._staging, label, self._lock.beside)

    def discard(self, staged: Staging) -> None:
        """Deletes a staging directory and gives it up; does nothing if it was already published or discarded."""
        self._check_own(staged, there=False)
        try:
            staged.remove()
        except OSError as e:
            raise RegistryError(f"{staged.path}: cannot be deleted: {e}") from e

    def publish(self, staged: Staging, record: ExportRecord, begin: Callable[[], None] = lambda: None) -> Version:
        """Makes a staged directory the next version; `record` is written into it, with its number, as the last file.

        RegistryError means that nothing was published, and the staging directory still belongs to the
        caller. `begin` is called under the lock while nothing is visible yet; it may raise.
        """
        self._check_own(staged)
        started = time.monotonic()
        try:
            fsync_tree(staged.path)  # the long part, so without the lock
        except OSError as e:
            raise RegistryError(f"{staged.path}: cannot be made durable: {e}") from e
        self._look()
        with self._locked():
            begin()
            number = self._next_number(self._load()[0])
            timings = {**record.timings_s, "publish": round(time.monotonic() - started, 4)}
            version = self._rename(staged, replace(record, version=number, timings_s=timings))
            try:
                self._book(version)
            except (OSError, RegistryError) as e:
                # The version is published and whole, so this is no failure; `recover` does the rest.
                log.warning("%s is published, but not all is noted: %s; the next start repairs that", version.path, e)
        staged.release()
        return version

    def refresh_pointers(self) -> list[str]:
        """Makes the links and `registry.json` match the versions; returns warnings."""
        self._look()
        with self._locked():
            return self._settle(self._load()[0])[1]

    def supersede_after(self, step: int) -> list[Version]:
        """Notes that the run was resumed at `step`; returns the versions of the abandoned past after it."""
        self.check_owner()
        if self._memory().latest_step() <= step:
            return []
        with self._locked():
            state = self._load()[0]
            gone = [v for v in self._versions(state, fresh=False) if not v.superseded and v.step > step]
            at = datetime.now(timezone.utc).isoformat(timespec="seconds")
            entry = {"resumed_at": step, "versions": [v.name for v in gone], "at": at}
            self._notes.append("superseded", entry)
            states.supersede(state, entry)
            self._settle_logged(state)
            return [replace(v, superseded=True) for v in gone]

    def pin(self, version: Version | str) -> Version:
        """Keeps `version` from being pruned."""
        return self._set_pin(version, True)

    def unpin(self, version: Version | str) -> Version:
        """Removes the pin of `version`."""
        return self._set_pin(version, False)

    def note_policy(self, keep: Keep) -> None:
        """Records the policy of a run, for those who prune by hand."""
        with self._locked():
            removal.note_policy(self._notes, keep)

    def prune(self, keep: Keep) -> tuple[RetentionPlan, list[str]]:
        """Removes the versions that `keep` does not keep, and retries earlier deletions that failed.

        Returns the plan and a line for every directory that cannot be deleted yet; those stop nothing else.
        """
        first = None
        while True:
            plan, marked = self._mark_removed(keep)
            first = first or plan
            failed = removal.resume_removals(self.root, self._notes, self._locked)[1]
            if marked == len(plan.removed):  # otherwise the disk was full, and now has more room
                compaction.compact(self._notes, self._locked)
                return first, failed

    def _mark_removed(self, keep: Keep) -> tuple[RetentionPlan, int]:
        """Judges without the lock, then notes the removals under it, unless something changed in between."""
        for left in reversed(range(_TRIES)):
            state = self._state()
            versions = self._versions(state)
            inside = pointers.inner_links(self.root, (v.name for v in versions))
            links = inside | pointers.links(self.root)
            plan, seen = retention.plan_retention(versions, keep, links), self._evidence(versions, links)
            lines = removal.sentence(self._notes, plan.removed)
            with self._locked():
                state = self._state()
                self._settle_logged(state)  # links first: none may lead to a removed version
                versions, links = self._versions(state, fresh=False), inside | pointers.links(self.root)
                if self._evidence(versions, links) != seen:
                    if left:
                        continue
                    plan = retention.plan_retention(versions, keep, links)
                    lines = removal.sentence(self._notes, plan.removed)
                if not plan.removed:
                    return plan, 0
                return plan, removal.mark_removed(self.root, self._notes, state, plan.removed, lines)
        raise AssertionError("unreachable")

    @staticmethod
    def _evidence(versions: list[Version], links: dict[str, str]) -> Any:
        return [(v.name, v.superseded, v.pinned) for v in versions], links

    def journal(self, event: str, **fields: Any) -> None:
        """Adds a durable entry; `time` defaults to now. Entries about exports (asked, failed…) need a `step`."""
        self.note([(event, fields)])

    def note(self, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Appends several entries to the journal, in order."""
        if entries:
            with self._locked():
                self._notes.append_all(entries)

    def request(self, note: str | None = None) -> Path:
        """Asks the run that exports here for a milestone at its next step."""
        self._check_root()
        return requests.put(self._requests, note)

    def pending_requests(self) -> list[Path]:
        return requests.pending(self._requests)

    def clear_requests(self, paths: Iterable[Path]) -> None:
        requests.clear(self._requests, paths)

    def recover(self) -> list[str]:
        """Repairs the state that a killed process left; returns a line for each repair, or problem for a person."""
        self._look()
        with self._locked():
            abandoned = staging.abandoned(self._staging, self._lock.beside)
            done = self._repair()
        for lines in removal.resume_removals(self.root, self._notes, self._locked):
            done += lines
        for finished in requests.done(self._requests):
            requests.delete(finished)
        for staged in abandoned:  # deleting may take long, so without the lock
            line = [f"{staged.path}: removed, since its writer is gone"] if staged.path.is_dir() else []
            try:
                staged.remove()
                done += line
            except OSError as e:
                done.append(f"{staged.path}: its writer is gone, but it cannot be removed: {e}")
        return done

    # -- inside ----------------------------------------------------------------------------

    @contextmanager
    def _locked(self, check: bool = True) -> Iterator[None]:
        self._check_root()
        self._lock.acquire(self.lock_timeout_s)
        try:
            if check:
                self.check_owner()
            yield
        except OSError as e:
            raise RegistryError(f"{self.root}: cannot be changed: {e}; are there space and permission?") from e
        finally:
            self._lock.release()

    def _check_own(self, staged: Staging, there: bool = True) -> None:
        if staged.path.parent != self._staging or (there and not staged.path.is_dir()):
            raise RegistryError(f"{staged.path}: not a staging directory in {self._staging}")

    def _next_number(self, state: State) -> int:
        taken = map(states.number_of, names_like_versions(self.root))
        return max(state.next_version, self._notes.facts().next_version, 1 + max(taken, default=0))

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
        state = self._load()[0]
        state.next_version = version.number + 1
        self._settle_logged(state)

    def _note_published(self, version: Version) -> None:
        fields = {"step": version.step, "version": version.name, "triggers": version.record.triggers}
        self._notes.append("published", fields)

    def _settle(self, state: State) -> tuple[list[str], list[str]]:
        """Writes `state`, then the links; both follow from the versions. Returns changes and warnings."""
        state.pointers = pointers.choose(self._versions(state, fresh=False))
        if self._load() != (state, None):
            state.write(self.root)
        return pointers.link(self.root, state.pointers)

    def _settle_logged(self, state: State) -> None:
        for warning in self._settle(state)[1]:
            log.warning("%s", warning)

    def _set_pin(self, version: Version | str, pinned: bool) -> Version:
        found = self.find(version if isinstance(version, str) else version.name)
        with self._locked():
            state = self._state()
            if found.name in state.removed or not found.path.is_dir():
                raise RegistryError(f"{found.path}: it was removed just now")
            if (found.name in state.pins) != pinned:
                self._notes.append("pinned" if pinned else "unpinned", {"version": found.name})
                (state.pins.append if pinned else state.pins.remove)(found.name)
                state.write(self.root)
            return replace(found, pinned=pinned)

    def _repair(self) -> list[str]:
        done = []
        left = [self.root / name for name in filter(is_temp, sorted(os.listdir(self.root)))]
        for path in (*left, *requests.abandoned(self.root)):
            path.unlink(missing_ok=True)  # a process without the lock, such as a probe, removes its own file
            done.append(f"{path}: removed, left by a killed process")
        state, problem = self._load()
        facts = self._notes.facts()
        for name, mark in facts.state().superseded.items():
            if state.superseded.setdefault(name, mark) is mark and not problem:
                done.append(f"{self.root / name}: marked superseded, as the journal says")
        for name in removal.note_lost(state, facts):
            if not problem and (self.root / name).exists():
                done.append(f"{self.root / name}: was removed, as the journal says")
        versions = self._versions(state, fresh=False)
        lost, known = [v for v in versions if v.name not in facts.published], self._notes.path.exists()
        for version in lost:
            self._note_published(version)
            done.append(f"{version.path}: its publication was missing in the journal, and has been added")
        if problem and (known or versions):
            done.append(f"{problem}; rebuilt from the versions and the journal")
        state.next_version = self._next_number(state)
        changed, warnings = self._settle(state)
        return done + changed + warnings

"""The reading half of an output directory: nothing here writes or locks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.milestones.events import Milestone
from verl_autoexport.registry import journal, pointers, removal, retention
from verl_autoexport.registry import state as states
from verl_autoexport.registry.history import Exported, Memory
from verl_autoexport.registry.journal_reader import Notes
from verl_autoexport.registry.retention import Keep, RetentionPlan
from verl_autoexport.registry.state import State
from verl_autoexport.registry.versions import Catalog, Version


class Reader:
    """The reading half of `Registry`. Each record and journal line is read only once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(os.path.abspath(root))
        self._notes = Notes(self.root / journal.NAME)
        self._catalog = Catalog(self.root)

    def versions(self) -> list[Version]:
        """All published versions by number, superseded ones included."""
        return self._versions(self._load()[0])

    def invalid(self) -> list[tuple[Path, str]]:
        """The paths that have a version's name but are no valid version, with the reasons."""
        found = self._catalog.scan()[1]
        removed = {*self._load()[0].removed}  # read after the scan: a removal notes itself before it begins
        return [(path, why) for path, why in found if path.name not in removed and os.path.lexists(path)]

    def pointers(self) -> dict[str, str]:
        """The targets of `latest`, `best`…: pointer -> directory name."""
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
        """The journal's valid entries in order, and a message for every damaged line."""
        return self._notes.read()

    def milestones(self, up_to_step: int | None = None) -> list[Milestone]:
        """The milestones that the triggers must remember, by step: published, pending, failed and dropped ones.

        Milestones that a rollback cancelled are left out; published versions that were removed since stay in.
        """
        told = self._memory().milestones()
        return [m for m in told if up_to_step is None or m.step <= up_to_step]

    def exported(self) -> list[Exported]:
        """The published milestones that no rollback cancelled, by number, removed versions included."""
        return self._memory().exported()

    def outcomes(self) -> list[dict[str, Any]]:
        """The journal entries, with their triggers, of failed and dropped milestones not published since."""
        return self._memory().outcomes()

    def plan_retention(self, keep: Keep) -> RetentionPlan:
        """The plan of a `prune`: the versions that it would remove, and why."""
        versions = self.versions()
        inside = pointers.inner_links(self.root, (v.name for v in versions))
        return retention.plan_retention(versions, keep, inside | pointers.links(self.root))

    def noted_policy(self) -> Keep | None:
        """The policy of the run that exports here, if the run recorded one."""
        return self._notes.facts().keep

    # -- inside ----------------------------------------------------------------------------

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise RegistryError(f"{self.root}: no such directory; expected the output_dir of a run")

    def _look(self) -> None:
        """Reads everything before the lock is taken, so that under the lock only new data are read."""
        self._catalog.scan()
        self._notes.facts()

    def _load(self) -> tuple[State, str | None]:
        return states.load(self.root, self._notes.facts)

    def _state(self) -> State:
        state = self._load()[0]
        removal.note_lost(state, self._notes.facts())
        return state

    def _versions(self, state: State, fresh: bool = True) -> list[Version]:
        """The valid versions. The holder of the lock passes `fresh` False; see `Catalog.scan`."""
        removed, pins = {*state.removed}, {*state.pins}
        return [
            Version(record.version, record.step, path, record, (name := path.name) in state.superseded, name in pins)
            for path, record in self._catalog.scan(fresh)[0]
            if path.name not in removed
        ]

    def _memory(self) -> Memory:
        state = self._load()[0]
        versions = self._versions(state)  # before the journal, which then knows the versions removed since
        return Memory(state, self.journal_entries()[0], versions)

    def _not_found(self, spec: str, versions: list[Version]) -> str:
        for path, reason in self.invalid():
            if path.name == spec:
                return f"{path} is no valid version: {reason}"
        return f"{self.root}: no version {spec!r:.200}; there is {pointers.listing(versions)}"

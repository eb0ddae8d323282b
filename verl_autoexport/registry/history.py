"""The milestones of the past, from journal and versions together, since their versions may be gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl_autoexport.milestones.events import Milestone, Trigger
from verl_autoexport.registry import journal
from verl_autoexport.registry.record import created_at
from verl_autoexport.registry.state import State, is_name, number_of
from verl_autoexport.registry.versions import Version
from verl_autoexport.system.untrusted import is_count


@dataclass(frozen=True)
class Exported:
    """A milestone that was published, whether or not its version still exists; `time` in unix seconds."""

    name: str
    step: int
    time: float
    triggers: tuple[dict[str, Any], ...]
    fingerprint: Any

    @property
    def number(self) -> int:
        return number_of(self.name)

    @classmethod
    def of(cls, version: Version) -> Exported:
        record = version.record
        triggers = tuple(map(dict, record.triggers))
        return cls(version.name, version.step, created_at(record), triggers, record.source.get("fingerprint"))


def past(entries: Iterable[dict[str, Any]]) -> dict[str, Exported]:
    """The removed versions by name, except those that a rollback cancelled before or after their removal."""
    found: dict[str, Exported] = {}
    for entry in entries:
        name, step = entry.get("version"), entry.get("step")
        if entry["event"] == "superseded" and is_count(resumed_at := entry.get("resumed_at")):
            found = {name: e for name, e in found.items() if e.step <= resumed_at}
        elif entry["event"] == "removed" and is_name(name) and is_count(step) and not entry.get("superseded"):
            triggers = tuple(t.to_dict() for t in journal.triggers(entry))
            found[name] = Exported(name, step, journal.seconds(entry, "created"), triggers, entry.get("fingerprint"))
    return found


@dataclass(frozen=True)
class Memory:
    """The whole record of the past: `registry.json`, the journal's entries, and the versions."""

    state: State
    entries: Sequence[dict[str, Any]]
    versions: Sequence[Version]

    def exported(self) -> list[Exported]:
        """The published milestones that no rollback cancelled, by number, removed versions included."""
        known = {name: done for name, done in past(self.entries).items() if name not in self.state.superseded}
        known |= {v.name: Exported.of(v) for v in self.versions if not v.superseded}
        return sorted(known.values(), key=lambda done: (done.number, done.step))

    def milestones(self) -> list[Milestone]:
        """Published, pending, failed and dropped milestones by step, except those that a rollback cancelled."""
        by_step = {step: fate.milestone() for step, fate in self._fates().items()}
        for done in self.exported():  # a step that was also exported by hand keeps the triggers of both
            known = by_step.get(done.step) or Milestone(done.step, done.time, ())
            asked = known.triggers if known.status != "failed" else ()
            triggers = dict.fromkeys((*asked, *map(Trigger.from_dict, done.triggers)))
            by_step[done.step] = replace(known, triggers=tuple(triggers), status="published")
        return [by_step[step] for step in sorted(by_step)]

    def outcomes(self) -> list[dict[str, Any]]:
        """The journal entries, with their triggers, of failed and dropped milestones not published since."""
        bad = [f for _, f in sorted(self._fates().items()) if f.status in ("failed", "dropped")]
        published = {done.step for done in self.exported()}
        return [{**f.entry, "triggers": [t.to_dict() for t in f.triggers]} for f in bad if f.step not in published]

    def latest_step(self) -> int:
        """The highest step that has a record which no rollback cancelled."""
        live = [v.step for v in self.versions if not v.superseded]
        return max([*journal.replay(self.entries), *(e.step for e in past(self.entries).values()), *live], default=-1)

    def _fates(self) -> dict[int, journal.Fate]:
        gone = self.state.superseded.keys()
        return {s: f for s, f in journal.replay(self.entries).items() if _version_of(f) not in gone}


def _version_of(fate: journal.Fate) -> str | None:
    return name if is_name(name := fate.entry.get("version")) else None

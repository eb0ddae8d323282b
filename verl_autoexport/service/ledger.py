"""What the run asked of the export actor, and what became of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from verl_autoexport.errors import shown
from verl_autoexport.milestones.events import Decision, Milestone
from verl_autoexport.milestones.triggers import History
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.actor import Outcome
from verl_autoexport.service.bookings import Bookings

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    decision: Decision
    request: Mapping[str, Any]
    ref: Any = None  # once the actor is asked
    snapshot: str | None = None  # of the live source
    outcome: Outcome | None = None


class Ledger:
    """The milestones of a run: `history` is the triggers' memory, `pending` what this process submitted.

    Only `write` touches the output directory; what is for the journal waits for it in `bookings`.
    """

    def __init__(self, registry: Registry, actor: Any) -> None:
        self.registry = registry
        self.actor = actor
        self.bookings = Bookings(registry)
        self._history = History()
        self.pending: list[_Pending] = []
        self.problems: list[str] = []

    @property
    def history(self) -> History:
        return self._history

    @history.setter
    def history(self, milestones: Iterable[Milestone]) -> None:
        self._history = History(milestones)

    @property
    def open(self) -> list[Any]:
        """The refs of the exports that the actor was asked for and has no outcome of yet, as far as `poll` has seen."""
        return [p.ref for p in self.pending if p.outcome is None and p.ref is not None]

    @property
    def unsent(self) -> list[_Pending]:
        """Chosen, and held, but the actor does not know of them."""
        return [p for p in self.pending if p.ref is None and p.outcome is None]

    @property
    def snapshots(self) -> dict[str, Any]:
        """The snapshots that exports without an outcome are made of, and their refs; None as long as it is unsent."""
        return {p.snapshot: p.ref for p in self.pending if p.outcome is None and p.snapshot is not None}

    def submit(self, decision: Decision, request: Mapping[str, Any]) -> None:
        self.remember(decision, "pending")
        snapshot = request["live"]["id"] if request.get("live") else None
        self.pending.append(_Pending(decision, request, None, snapshot))
        logger.warning(
            "verl_autoexport: step %s is a milestone: %s",
            decision.step,
            ", ".join(shown(t.reason) for t in decision.triggers),
        )

    def send(self) -> None:
        """Ask the actor for what was chosen, in order."""
        for pending in self.unsent:
            pending.ref = self.actor.export.remote(pending.request)

    def hold(self) -> None:
        """Have the actor keep what workers hand over of snapshots that it is not asked for yet."""
        for pending in self.unsent:
            if pending.snapshot is not None:
                self.actor.expect.remote(pending.snapshot)

    def poll(self) -> list[Outcome]:
        """Take in the outcomes that are there, without waiting; returns the new failures."""
        failures = self.take()
        for lost in (f for f in failures if f.get("lost")):
            self.journal("failed", step=lost["step"], reason=lost["reason"])
        return failures

    def take(self) -> list[Outcome]:
        """`poll`, but for no journal."""
        refs = {p.ref: p for p in self.pending if p.outcome is None and p.ref is not None}
        failures = []
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else ():
            pending = refs[ref]
            try:
                pending.outcome = ray.get(ref)
            except ray.exceptions.RayError as e:
                reason = f"the export actor was lost: {type(e).__name__}: {e}".splitlines()[0]
                step = pending.decision.step
                pending.outcome = {"step": step, "status": "failed", "reason": reason, "lost": True}
            if pending.outcome["status"] == "failed":
                failures.append(pending.outcome)
            self.remember(pending.decision, pending.outcome["status"])
        return failures

    def wait(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` seconds for what is pending."""
        if refs := self.open:
            logger.warning("verl_autoexport: finishing %d export(s), at most %.0f s", len(refs), timeout_s)
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    def report(self) -> str:
        """One line: what was exported, what was not and why."""
        outcomes = [p.outcome for p in self.pending if p.outcome is not None]
        published = [o["version"] for o in outcomes if o["status"] == "published"]
        parts = [f"{len(published)} published" + (f" ({', '.join(published)})" if published else "")]
        for status in ("failed", "dropped"):
            which = [f"step {o['step']}: {o['reason']}" for o in outcomes if o["status"] == status]
            parts += [f"{len(which)} {status} ({'; '.join(which)})"] if which else []
        for live, then in ((False, "the next start of this run finishes them"), (True, "their snapshots are lost")):
            late = [p for p in self.pending if p.outcome is None and (p.snapshot is not None) == live]
            if steps := ", ".join(str(p.decision.step) for p in late):
                parts.append(f"not finished in time: step {steps}; {then}")
        parts += self.problems
        return f"verl_autoexport: {'; '.join(parts)}; in {self.registry.root}"

    def remember(self, decision: Decision, status: str) -> None:
        self.history.remember(Milestone(decision.step, decision.time, decision.triggers, status))

    def asked(self, step: int) -> bool:
        """Whether this step is exported, or is going to be."""
        return self.history.stands(step)

    def note(self, step: int, status: str, reason: str) -> None:
        """A milestone that never reached the actor."""
        logger.warning("verl_autoexport: step %s %s: %s", step, status, shown(reason))
        self.problems.append(f"step {step} {status}: {reason}")
        self.journal(status, step=step, reason=reason)

    def lost(self, decision: Decision, reason: str) -> None:
        """A milestone that never reached the actor and never will."""
        self.note(decision.step, "failed", reason)
        self.remember(decision, "failed")

    def journal(self, event: str, **fields: Any) -> None:
        self.bookings.add(event, **fields)

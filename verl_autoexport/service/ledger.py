"""The exports that a run asked for, and their outcomes."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from verl_autoexport.errors import shown
from verl_autoexport.milestones.events import Decision
from verl_autoexport.milestones.judge import Judge
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.bookings import Bookings
from verl_autoexport.service.protocol import ExportService
from verl_autoexport.service.request import ExportRequest, Outcome

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    request: ExportRequest
    future: Future[Outcome] | None = None  # set once the service has the request
    outcome: Outcome | None = None

    @property
    def decision(self) -> Decision:
        return self.request.decision

    @property
    def snapshot(self) -> str | None:
        return None if self.request.snapshot is None else self.request.snapshot.fingerprint


class Ledger:
    """The exports of a run. `pending` are those that this process submitted; the judge remembers their outcomes.

    Nothing here touches the output directory; entries for the journal wait in `bookings`.
    """

    def __init__(self, registry: Registry, service: ExportService, judge: Judge) -> None:
        self.registry = registry
        self.service = service
        self.judge = judge
        self.bookings = Bookings(registry)
        self.pending: list[_Pending] = []
        self.problems: list[str] = []

    @property
    def open(self) -> list[Future[Outcome]]:
        """The exports that the service has and that have no outcome yet, as far as `poll` has seen."""
        return [p.future for p in self.pending if p.outcome is None and p.future is not None]

    @property
    def unsent(self) -> list[_Pending]:
        """Exports that are chosen and held, but that the service does not know yet."""
        return [p for p in self.pending if p.future is None and p.outcome is None]

    @property
    def snapshots(self) -> dict[str, Future[Outcome] | None]:
        """The snapshots without an outcome, each with its export; None while that is unsent."""
        return {p.snapshot: p.future for p in self.pending if p.outcome is None and p.snapshot is not None}

    def submit(self, request: ExportRequest) -> None:
        self.judge.remember(request.decision, "pending")
        self.pending.append(_Pending(request))
        reasons = ", ".join(shown(t.reason) for t in request.triggers)
        logger.info("verl_autoexport: step %s is a milestone: %s", request.step, reasons)

    def send(self) -> None:
        """Sends the chosen exports to the service, in order."""
        for pending in self.unsent:
            pending.future = self.service.submit(pending.request)

    def expect(self) -> None:
        """Has the service keep the workers' parts of snapshots whose exports are still unsent."""
        for pending in self.unsent:
            if pending.snapshot is not None:
                self.service.expect(pending.snapshot)

    def poll(self) -> list[Outcome]:
        """Takes in the available outcomes without waiting; returns the new failures."""
        failures = self.take()
        for lost in (f for f in failures if f.lost):
            self.journal("failed", step=lost.step, reason=lost.reason)
        return failures

    def take(self) -> list[Outcome]:
        """Takes in the available outcomes without waiting or journal; returns the new failures."""
        failures = []
        for pending in self.pending:
            if pending.outcome is None and pending.future is not None and pending.future.done():
                pending.outcome = pending.future.result()
                failures += [pending.outcome] if pending.outcome.status == "failed" else []
                self.judge.remember(pending.decision, pending.outcome.status)
        return failures

    def wait(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` seconds for pending exports."""
        if exports := self.open:
            logger.info("verl_autoexport: finishing %d export(s), at most %.0f s", len(exports), timeout_s)
            wait(exports, timeout_s)

    def report(self) -> str:
        """One line: the exported steps, and the others with their reasons."""
        outcomes = [p.outcome for p in self.pending if p.outcome is not None]
        published = [str(o.version) for o in outcomes if o.status == "published"]
        parts = [f"{len(published)} published" + (f" ({', '.join(published)})" if published else "")]
        for status in ("failed", "dropped"):
            which = [f"step {o.step}: {o.reason}" for o in outcomes if o.status == status]
            parts += [f"{len(which)} {status} ({'; '.join(which)})"] if which else []
        for live, then in ((False, "the next start of this run finishes them"), (True, "their snapshots are lost")):
            late = [p for p in self.pending if p.outcome is None and (p.snapshot is not None) == live]
            if steps := ", ".join(str(p.request.step) for p in late):
                parts.append(f"not finished in time: step {steps}; {then}")
        parts += self.problems
        return f"verl_autoexport: {'; '.join(parts)}; in {self.registry.root}"

    def note(self, step: int, status: str, reason: str) -> None:
        """Notes a milestone that never reached the service."""
        logger.warning("verl_autoexport: step %s %s: %s", step, status, shown(reason))
        self.problems.append(f"step {step} {status}: {reason}")
        self.journal(status, step=step, reason=reason)

    def lost(self, decision: Decision, reason: str) -> None:
        """Notes a milestone that never reached the service and never will, and remembers it as failed."""
        self.note(decision.step, "failed", reason)
        self.judge.remember(decision, "failed")

    def journal(self, event: str, **fields: Any) -> None:
        self.bookings.add(event, **fields)

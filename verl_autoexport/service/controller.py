"""The controller of a run, in the trainer's driver: it holds checkpoints, asks the judge, and has milestones exported.

It knows no trainer and no Ray: an adapter calls it, and a service exports for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import AutoExportError, RegistryBusy, RegistryError, SourceBusy, SourceError
from verl_autoexport.milestones.events import Decision, StepEvent
from verl_autoexport.milestones.judge import Judge
from verl_autoexport.milestones.metrics import check_logged, numbers
from verl_autoexport.milestones.triggers import RunStart
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.exporter import MAX_WAITING
from verl_autoexport.service.ledger import Ledger
from verl_autoexport.service.protocol import ExportService
from verl_autoexport.service.request import ExportRequest, Outcome, RunInfo, make_request
from verl_autoexport.service.requests import Asked
from verl_autoexport.sources import holds
from verl_autoexport.sources.holds import Hold
from verl_autoexport.system.deadlines import Bounded, GivenUp, wait_for

if TYPE_CHECKING:
    from verl_autoexport.sources.live.coordinator import LiveSource
    from verl_autoexport.sources.live.snapshot import SnapshotHandle
    from verl_autoexport.sources.nodes.cluster import Nodes

logger = logging.getLogger(__name__)
_LOCK_S = 2.0  # training waits at most this long for another process that uses the output directory
_AGAIN_S = 0.2
StartService = Callable[[AutoExportConfig, str], ExportService]
"""Starts a service with the settings of the run; the token names the owner."""


class ExportFailed(AutoExportError):
    """A milestone that failed; training sees this error only with `on_error=raise`."""


class RunController:
    """Holds a checkpoint at `saved`, decides at `logged`, has a service export milestones, and waits for it in `drain`.

    Order of calls: `begin`, then for each step `saved` (if verl saved it) and `logged`,
    then `end`, then `drain`. `logged` raises ConfigError at the first validation for a metric
    that no step logs; the caller guards against every other error.
    """

    def __init__(self, settings: AutoExportConfig, info: RunInfo, service: StartService | None = None) -> None:
        self.settings = settings
        self.info = info
        self.calls = Bounded()
        self.registry = Registry.create(settings.output_dir)
        self.lease = self.registry.own("/".join(str(info.run[k]) for k in ("project", "experiment") if k in info.run))
        self.registry.lock_timeout_s = _LOCK_S
        self.service = (service or _in_ray)(settings, self.lease.token)
        self.judge = Judge(settings.trigger)
        self.ledger = Ledger(self.registry, self.service, self.judge)
        self.live: LiveSource | None = None
        self.nodes: Nodes | None = None
        self.holds: dict[int, Hold] = {}
        """By step: saved, but not decided yet."""
        self.beyond: list[Hold] = []
        """Holds of steps beyond the resumed one, until the run has a past of its own."""
        self.requests = Asked(self.registry.root)
        self.saved_step = 0  # the last step with a checkpoint, held or not
        self.trained = self.past_cut = False
        self.logged_step = 0
        self.metrics_checked = not settings.trigger.metrics
        self.hold_s = 0.0
        self.entered = time.monotonic()

    # -- the run's events --------------------------------------------------------------

    def begin(
        self, step: int, last_step: int | None, live: LiveSource | None = None, nodes: Nodes | None = None
    ) -> None:
        """Training is about to start from `step` (0, or the resumed one).

        The workers of `live` copy their shards; the `nodes` keep checkpoints on disks of their own.
        """
        self.live, self.nodes = live, nodes
        if nodes is not None:
            self.info = replace(self.info, homes=tuple(nodes.homes[rank] for rank in sorted(nodes.homes)))
        self._bounded(f"begin at step {step}", self._begin, step, last_step)

    def _begin(self, step: int, last_step: int | None) -> None:
        self.logged_step = step
        self.judge.begin(RunStart(step, time.time()), last_step, self.registry.milestones(up_to_step=step))
        found = holds.find_holds(self.info.checkpoints)
        if self.nodes is not None:
            self.nodes.release_others(self.info.checkpoints)
        for hold in found:
            if hold.request is None and hold.step == step:
                self.holds[step] = hold  # saved, but the run died before it decided
            elif hold.request is not None and hold.step <= step:
                self._resubmit(hold)
            else:
                self.beyond.append(hold)
        self._hold_unseen(step)
        resumed = {p.decision.step for p in self.ledger.pending}
        for lost in [m for m in self.judge.history if m.status == "pending" and m.step not in resumed]:
            self.ledger.note(lost.step, "failed", "interrupted, and its checkpoint was not kept")
            self.judge.remember(Decision(lost.step, lost.time, lost.triggers), "failed")
        self.ledger.send()

    def _hold_unseen(self, step: int) -> None:
        """Holds the resumed step if the previous run was killed after verl saved it and before it was held here."""
        judged = any(m.step == step and {t.policy for t in m.triggers} != {"command"} for m in self.judge.history)
        if not step or judged or step in self.holds or self.settings.source == "live" or self.lease.before is None:
            return
        try:
            folder = self.info.checkpoints / f"global_step_{step}"
            self.holds[step] = self._hold(folder, step)
        except SourceError as e:  # for example, the run resumed from another directory
            logger.warning("verl_autoexport: the resumed step %s can no longer be judged: %s", step, e)

    def saved(self, step: int, checkpoint_dir: Path) -> None:
        """verl has written the checkpoint of `step`; `source=auto` prefers it to a copy, since it outlives the run.

        Raises SourceError when some of its shards are missing and no copy can replace them.
        """
        self._bounded(f"saved at step {step}", self._saved, step, checkpoint_dir)

    def _saved(self, step: int, checkpoint_dir: Path) -> None:
        self.saved_step = step
        if self.settings.source == "live":
            return
        started = time.monotonic()
        try:
            hold = self._hold(checkpoint_dir, step)
        except SourceError as e:
            if self.live is None:
                raise
            logger.info("verl_autoexport: step %s is not exported from its checkpoint: %s", step, e)
            return
        if not hold.linked:
            logger.warning(
                "verl_autoexport: %s: no hard links on this file system; verl may delete step %s before it is exported",
                hold.path,
                step,
            )
        self.holds[step] = hold
        self.trained = self.trained or step > self.judge.start.step
        self.hold_s = time.monotonic() - started
        self._book()  # before the validation, which the run may not survive

    def logged(self, step: int, data: Mapping[str, object]) -> None:
        """verl logs `step`: all its metrics exist, and the workers still have its weights."""
        self.entered = time.monotonic()
        self._bounded(f"logged at step {step}", self._logged, step, data)

    def _logged(self, step: int, data: Mapping[str, object]) -> None:
        if not self.metrics_checked:
            trained = step > self.judge.start.step
            self.metrics_checked = check_logged(self.settings.trigger, data, trained)
        self.logged_step = max(step, self.logged_step)
        asked = self.requests.look if self.settings.trigger.on_request else bool
        for saved in (s for s in self.holds if s <= step and s not in self.judge.waiting):
            # An earlier one is the resumed step, which not every run logs again.
            metrics, requested = (numbers(data), asked()) if saved == step else ({}, False)
            self.judge.log(StepEvent(saved, metrics, time.time(), requested=requested))
        if self.live is not None and step > self.judge.start.step and step not in self.holds:
            self.judge.log(StepEvent(step, numbers(data), time.time(), step == self.saved_step, asked()))
        self._decide_all()
        self._book()

    def end(self, succeeded: bool) -> None:
        """`fit` is over. A remaining hold was never logged, since training failed; a resumed run decides it."""
        self.entered = time.monotonic()
        self._bounded("end", self._end, succeeded)

    def _end(self, succeeded: bool) -> None:
        trained = self.logged_step > self.judge.start.step
        if succeeded and self.judge.start.step in self.holds:
            self.judge.log(StepEvent(self.judge.start.step, {}, time.time()))
        self.judge.end(succeeded, self.logged_step)
        self._decide_all(ended=True)
        wanted = self.settings.trigger.on_train_end and self.live is None and succeeded and trained
        if wanted and not self.judge.history.stands(self.logged_step):
            self.ledger.note(self.logged_step, "failed", "on_train_end: verl saved no checkpoint of the final step")
        self._book()

    def drain(self, timeout_s: float) -> str:
        """Waits at most `timeout_s` seconds for pending exports; returns the run's report in one line."""
        deadline = time.monotonic() + timeout_s
        self._book_until(deadline)
        self.ledger.wait(max(0.0, deadline - time.monotonic()))
        try:
            return self._bounded("the report", self._conclude)
        except GivenUp as e:
            self.ledger.problems.append(str(e))
            self.ledger.take()
            return self.ledger.report()

    # -- inside -----------------------------------------------------------------------

    def _bounded(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """Runs `call`, but training waits for no file system longer than the stall timeout; raises GivenUp."""
        return self.calls.run(self.settings.queue.stall_timeout_s, what, call, *args)

    def _conclude(self) -> str:
        self.ledger.poll()
        line = self.ledger.report()
        self.ledger.journal("report", line=line)
        try:
            self.ledger.bookings.write()
        except (AutoExportError, OSError) as e:
            entries = len(self.ledger.bookings.waiting)
            line += f"; not in the journal ({entries} entries, this line among them): {e}"
        if not self.ledger.open:  # otherwise the actor continues until this process ends
            self.lease.release()
        return line

    def _book(self) -> bool:
        """Tells the registry and the actor what happened, after the workers' weights have been copied.

        False: another process holds the lock, so the next event tries again. Raises RegistryError for other errors.
        """
        try:
            if self.trained and not self.past_cut:
                self._cut_past()  # before any export of the new past
            self.ledger.send()
            self.requests.settle({p.decision.step for p in self.ledger.unsent})
            self.ledger.bookings.write()
        except RegistryBusy as e:
            if self.registry.lock_timeout_s:
                logger.warning("verl_autoexport: journal write delayed, nothing is lost: %s", e)
            self.registry.lock_timeout_s = 0.0  # training has waited for the lock once
            self.ledger.expect()
            return False
        self.registry.lock_timeout_s = _LOCK_S
        return True

    def _book_until(self, deadline: float) -> None:
        """Waits for the registry's lock while entries wait to be booked; the report says why any could not be."""
        try:
            while not self._bounded("booking", self._book) and time.monotonic() < deadline:
                time.sleep(_AGAIN_S)
        except (AutoExportError, OSError) as e:
            self.ledger.problems.append(f"some journal entries were not written: {e}")

    def _cut_past(self) -> None:
        """The run's first trained step gives it a past of its own: everything beyond the resumed step is removed."""
        for version in self.registry.supersede_after(self.judge.start.step):
            logger.info("verl_autoexport: %s superseded: resumed at step %s", version.path, self.judge.start.step)
        mine = {hold.path for hold in self.holds.values()}
        for hold in self.beyond:
            if hold.request is not None:
                self.ledger.note(
                    hold.step, "dropped", f"the run went back to step {self.judge.start.step} before it was exported"
                )
            if hold.path not in mine:  # the same bytes, saved again, share one hold
                self._release(hold)
        self.past_cut = True

    def _decide_all(self, ended: bool = False) -> None:
        """Decides each event that is due, without the output directory, which may be out of reach."""
        for event in self.judge.due(ended):
            self.trained = self.trained or event.step > self.judge.start.step
            self._decide(event, self.holds.get(event.step))
            self.judge.decided(event.step)
            self.holds.pop(event.step, None)

    def _decide(self, event: StepEvent, hold: Hold | None) -> None:
        if hold is None and event.step != self.logged_step:  # by now the workers have later weights
            if (missed := self.judge.decide(event, spaced=False)) is not None:
                self.ledger.lost(missed, "it could not be judged while the workers had its weights")
            return
        failures = self.ledger.poll()
        if failures and self.settings.on_error == "raise":
            raise ExportFailed(f"step {failures[0].step}: {failures[0].reason}")
        decision = self.judge.decide(event)
        if decision is None or not self._make_room(decision, hold is None):
            if hold is not None:
                self._release(hold)
            return
        request = self._captured(decision, event) if hold is None else self._held(decision, event, hold)
        if request is None:
            return
        self.ledger.submit(request)
        if event.requested:
            self.requests.taken_by(event.step)

    def _held(self, decision: Decision, event: StepEvent, hold: Hold) -> ExportRequest:
        request = self._request(decision, event, hold)
        try:
            holds.choose(hold, request.to_json())
        except OSError as e:
            logger.warning("verl_autoexport: %s: %s; step %s would not survive a kill", hold.path, e, hold.step)
        return request

    def _hold(self, checkpoint_dir: Path, step: int) -> Hold:
        make = holds.make_hold if self.nodes is None else self.nodes.hold
        return make(checkpoint_dir, step, self.settings.role)

    def _release(self, hold: Hold) -> None:
        holds.release(hold.path)
        if hold.spread and self.nodes is not None:
            self.nodes.release(hold.path)

    def _make_room(self, decision: Decision, copied: bool) -> bool:
        """With `queue.overflow=wait`, blocks training until an export finishes or the time is up.

        Whatever the policy, a copy of the weights also waits while the object store is full: it has no room there.
        """
        queue, exports = self.settings.queue, self.ledger.open
        surplus = len(exports) - MAX_WAITING if queue.overflow == "wait" else 0
        if copied and self.live is not None and len(snapshots := self.ledger.snapshots) >= self.live.room:
            exports = [export for export in snapshots.values() if export is not None]
            surplus = max(surplus, len(snapshots) + 1 - self.live.room)
        if surplus <= 0:
            return True
        if queue.overflow != "wait" and decision.droppable:
            return self._drop(decision, f"{len(exports)} snapshots are in flight (queue.inflight_bytes)")
        started = time.monotonic()
        if copied and self.ledger.unsent:
            exports = self._sent(started + queue.wait_timeout_s)
        left = max(0.0, started + queue.wait_timeout_s - time.monotonic())
        with self.calls.uncounted():
            done = wait_for(exports, min(surplus, len(exports)), left)
        logger.warning("verl_autoexport: training waited %.1f s for exports", time.monotonic() - started)
        self.ledger.poll()
        if done < (min(surplus, len(exports)) or 1) and (decision.droppable or copied):
            why = f"no export finished within queue.wait_timeout_s={queue.wait_timeout_s:g}"
            if decision.droppable:
                return self._drop(decision, why)
            self.ledger.lost(decision, why)
            return False
        return True

    def _sent(self, deadline: float) -> list[Future[Outcome]]:
        """The exports of all snapshots. While the lock is held the service does not know them, and none can end."""
        with suppress(RegistryError, OSError):  # the booking of this step reports it again
            while not self._book() and time.monotonic() < deadline:
                with self.calls.uncounted():
                    time.sleep(_AGAIN_S)
        return [export for export in self.ledger.snapshots.values() if export is not None]

    def _drop(self, decision: Decision, why: str) -> bool:
        """Always False: there is no room. With `coalesce` a live milestone stays due, and a later step replaces it."""
        if self.live is not None and self.settings.queue.overflow == "coalesce":
            self.ledger.note(decision.step, "dropped", f"coalesced into a later step: {why}")
        else:
            self.ledger.note(decision.step, "dropped", f"skipped: {why}")
            self.judge.remember(decision, "dropped")
        return False

    def _captured(self, decision: Decision, event: StepEvent) -> ExportRequest | None:
        """The request, once the workers have copied the weights of this step; None if they could not."""
        if self.live is None:
            self.ledger.lost(decision, "its checkpoint is not held, and workers are not copied")
            return None
        queue = self.settings.queue
        wait_s = 0.0 if decision.droppable and queue.overflow != "wait" else queue.wait_timeout_s
        try:
            with self.calls.uncounted():  # a call that was given up would copy the weights of a later step
                snapshot = self.live.capture(self.service.receiver, wait_s, self.ledger.snapshots.keys())
        except SourceBusy as e:
            if decision.droppable:
                self._drop(decision, str(e))
                return None
            self.ledger.lost(decision, f"{e}, for more than queue.wait_timeout_s={queue.wait_timeout_s:g}")
            return None
        except (SourceError, GivenUp) as e:
            self.ledger.lost(decision, str(e))
            return None
        return self._request(decision, event, snapshot)

    def _request(self, decision: Decision, event: StepEvent, source: Hold | SnapshotHandle) -> ExportRequest:
        stall_s = (self.hold_s if isinstance(source, Hold) else 0.0) + time.monotonic() - self.entered
        return make_request(self.info, decision, event, source, stall_s)

    def _resubmit(self, hold: Hold) -> None:
        now = {"pin": str(hold.path), "directory": str(hold.directory), "origin": hold.origin}  # may have been moved
        try:
            request = ExportRequest.from_json({**(hold.request or {}), **now}, hold.step)
        except ValueError as e:
            self.ledger.note(hold.step, "failed", f"its request in {hold.path}, which is kept, cannot be read: {e}")
            return
        if request.attempts >= holds.MAX_ATTEMPTS:
            logger.warning("verl_autoexport: %s", holds.given_up(hold, self.settings.output_dir))
            return
        logger.info("verl_autoexport: step %s was interrupted; exporting it now", hold.step)
        self.ledger.submit(request)


def _in_ray(settings: AutoExportConfig, owner: str) -> ExportService:
    from verl_autoexport.service.ray_service import RayExportService

    return RayExportService(settings, owner)

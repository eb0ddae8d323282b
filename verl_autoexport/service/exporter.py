"""The exporter: it exports one milestone at a time while a few wait. It knows no Ray; a service says where it runs."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import AutoExportError, RegistryBusy, shown
from verl_autoexport.export.pipeline import VERIFYING, export_to_registry
from verl_autoexport.export.spec import ExportSpec
from verl_autoexport.merge.protocol import MergeRunner
from verl_autoexport.publishers.protocol import GROUP, Publisher
from verl_autoexport.registry.retention import Keep, show_size
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.bookings import Bookings
from verl_autoexport.service.protocol import LocalSources, Sources
from verl_autoexport.service.request import ExportRequest, Outcome, make_spec
from verl_autoexport.sources import holds
from verl_autoexport.system.deadlines import Bounded, GivenUp, Watch, start
from verl_autoexport.system.logs import show_info
from verl_autoexport.system.plugins import load

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
MAX_WAITING = 2
"""Exports that may wait behind the running one before `queue.overflow` applies."""


@dataclass
class _Job:
    """One requested export. `noted`: the journal has the request; until then the job is neither begun nor dropped."""

    request: ExportRequest
    done: Future[Outcome] = field(default_factory=Future)
    noted: threading.Event = field(default_factory=threading.Event)


def _patiently(call: Callable[[], _T]) -> _T:
    """Returns the result of `call`, once no other process holds the registry's lock."""
    while True:
        try:
            return call()
        except RegistryBusy as e:
            logger.warning("verl_autoexport: %s; exports wait for it", e)


class Exporter:
    """Exports milestones. `export` returns once its export has an outcome; it never raises for a failed one.

    A service that restarts the exporter after its process died sends the unfinished calls again, so
    `export` never repeats work: it returns a published version unchanged. `owner` is the token of
    the run's lease: once another run has the lease, this one publishes and releases nothing.
    """

    def __init__(
        self,
        settings: AutoExportConfig,
        runner: MergeRunner,
        owner: str | None = None,
        sources: Sources | None = None,
        publishers: Sequence[Publisher] | None = None,
    ) -> None:
        show_info()
        self.settings = settings
        self.registry = _patiently(lambda: Registry.create(settings.output_dir, owner=owner))
        # A finished version waits for the lock as long as a stage may take, so that the lock cannot lose it.
        self.patient = Registry(settings.output_dir, settings.queue.stage_timeout_s / 2, owner)
        try:
            for line in _patiently(self.registry.recover):
                logger.info("verl_autoexport: recovered: %s", shown(line))
        except AutoExportError as e:
            logger.warning("verl_autoexport: an interrupted change could not be repaired: %s", e)
        self.bookings = Bookings(self.registry)
        self.keep = Keep(**dataclasses.asdict(settings.keep))
        try:
            self.registry.note_policy(self.keep)
        except AutoExportError as e:
            logger.warning("verl_autoexport: `verl-autoexport prune` will not know this run's keep.*: %s", e)
        self.runner = runner
        self.sources = sources or LocalSources()
        self.publishers = load(GROUP) if publishers is None else publishers
        self.waiting: list[_Job] = []
        self.running = 0
        self.changed = threading.Condition()
        threading.Thread(target=self._work, name="autoexport", daemon=True).start()

    def export(self, request: ExportRequest) -> Outcome:
        """Queues one milestone and waits for its outcome."""
        job = _Job(request)
        with self.changed:  # never held during a call that a file system may hang
            self.waiting.append(job)
            self.waiting.sort(key=lambda j: j.request.step)  # Ray may start concurrent calls in any order
            surplus = self._surplus()
            if surplus is not None:
                self.waiting.remove(surplus[0])
        self._bounded(f"noting step {request.step}", self._note_asked, request)
        with self.changed:
            job.noted.set()
            self.changed.notify_all()
        if surplus is not None:
            dropped, reason = surplus
            dropped.noted.wait()
            dropped.done.set_result(self._settle(dropped.request, "dropped", reason))
        return job.done.result()

    def _release(self, request: ExportRequest) -> None:
        if request.hold is not None and not self._taken_over():  # otherwise the other run exports the hold
            holds.release(request.hold)
            self.sources.release(request)
        elif request.snapshot is not None:
            self.sources.release(request)

    def _is_last_copy(self, request: ExportRequest) -> bool:
        """Whether the step exists only in the hold, so that another try needs it."""
        if request.hold is None or self._taken_over():
            return False
        return self.sources.is_last_copy(request) if request.spread else holds.is_last_copy(request.hold)

    def _keep(self, request: ExportRequest, hold: Path) -> None:
        try:
            attempts = holds.count_attempt(hold)
        except (OSError, ValueError, KeyError, TypeError) as e:
            logger.warning("verl_autoexport: %s: its failure could not be recorded: %r", hold, e)
            return
        then = "the next start of this run tries again" if attempts < holds.MAX_ATTEMPTS else "it is not tried again"
        logger.warning(
            "verl_autoexport: step %s has failed %s time(s) and is kept in %s, its last copy; %s",
            request.step, attempts, hold, then,
        )  # fmt: skip
        waiting = {job.request.hold for job in self.waiting}
        for old in holds.too_many(hold.parent.parent):
            if old.path not in waiting:
                logger.warning("verl_autoexport: step %s is given up: %s later ones failed", old.step, holds.MAX_KEPT)
                self._release(replace(request, hold=old.path, spread=old.spread, snapshot=None))

    def _taken_over(self) -> bool:
        try:
            self.registry.check_owner()
        except AutoExportError:
            return True
        except OSError:  # no evidence of another run
            return False
        return False

    def _surplus(self) -> tuple[_Job, str] | None:
        """The milestone that back pressure drops, and why; never `best`, `at_steps`, `threshold` or `on_train_end`."""
        droppable = [job for job in self.waiting if job.request.droppable]
        overflow = self.settings.queue.overflow
        if len(self.waiting) + self.running <= MAX_WAITING + 1 or overflow == "wait" or not droppable:
            return None
        full = f"{MAX_WAITING} exports were waiting already"
        if overflow == "skip":
            return droppable[-1], f"skipped: {full}"
        if len(droppable) == 1:
            return None  # nothing later to coalesce into
        return droppable[0], f"coalesced into step {droppable[-1].request.step}: {full}"

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting and self.waiting[0].noted.is_set())
                job = self.waiting.pop(0)
                self.running = 1
            outcome = self._supervised(job.request)
            if job.request.snapshot is not None:
                gc.collect()  # a traceback in a reference cycle would keep gigabytes of the object store
            if outcome.status == "published":
                for publisher in self.publishers:
                    self._bounded(f"publisher {publisher.name}", self._publish, publisher, outcome)
                self._bounded("removing old versions", self._retain)
            with self.changed:
                self.running = 0
            job.done.set_result(outcome)

    def _supervised(self, request: ExportRequest) -> Outcome:
        """The outcome of `_export`, which is given up when a stage makes no progress for too long."""
        watch = Watch()
        future = start(self._export, request, watch)
        while not future.done():
            limit = self.settings.queue.stage_timeout_s
            limit += self.settings.verify.timeout_s if watch.name == VERIFYING else 0
            wait([future], max(0.0, limit - watch.idle_s()))
            if not future.done() and watch.idle_s() >= limit:
                watch.give_up()
                reason = f"given up: {watch.name}: no progress for {limit:g} s (queue.stage_timeout_s)"
                settled = self._bounded(f"noting step {request.step}", self._settle, request, "failed", reason)
                return settled or Outcome(request.step, "failed", reason=reason)
        return future.result()

    def _bounded(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """Returns None if the call hangs; the hung call stays behind in its own thread and blocks no other."""
        try:
            return Bounded().run(self.settings.queue.stage_timeout_s, what, call, *args)
        except GivenUp as e:
            logger.warning("verl_autoexport: %s", e)
            return None

    def _export(self, request: ExportRequest, watch: Watch) -> Outcome:
        step = request.step
        try:
            if version := self._published(request):
                self._release(request)
                return Outcome(step, "published", version, "was published already")
            version = export_to_registry(self._spec(request), self.patient, self.runner, watch)
        except GivenUp:
            return Outcome(step, "failed", reason="given up")  # nobody waits, and everything is noted
        except AutoExportError as e:
            return self._settle(request, "failed", f"{type(e).__name__}: {e}")
        except BaseException as e:  # remote code may exit, libraries may panic: the queue must go on
            logger.exception("verl_autoexport: export of step %s", step)
            return self._settle(request, "failed", f"unexpected {type(e).__name__}: {e}")
        self._release(request)
        logger.info("verl_autoexport: published %s (%s)", version.path, ", ".join(t.reason for t in request.triggers))
        return Outcome(step, "published", version.name)

    def _spec(self, request: ExportRequest) -> ExportSpec:
        spec = make_spec(request, self.settings)
        if (source := self.sources.open(request)) is None:
            return spec
        return replace(
            spec, source=source, checkpoint=source.directory, hand_over_s=getattr(source, "hand_over_s", None)
        )

    def _published(self, request: ExportRequest) -> str | None:
        """The version of this very milestone; an export of the same step by hand lacks its triggers."""
        wanted = {(t.policy, t.name) for t in request.triggers}
        for done in self.registry.exported():  # including those that retention has removed since
            has = {(t.get("policy"), t.get("name")) for t in done.triggers}
            if done.step == request.step and done.fingerprint == request.fingerprint and wanted <= has:
                return done.name
        return None

    def _publish(self, publisher: Publisher, outcome: Outcome) -> None:
        """Delivers before retention, which may remove the version. A failed delivery is noted and stops nothing."""
        entry = {"step": outcome.step, "version": outcome.version, "publisher": publisher.name}
        try:
            receipt = publisher.publish(self.registry.find(str(outcome.version)))
            logger.info("verl_autoexport: %s is at %s", outcome.version, shown(receipt.where))
            self.bookings.add("delivered", **entry, where=receipt.where)
        except Exception as e:  # foreign code
            logger.exception("verl_autoexport: %s was not delivered by %s", outcome.version, publisher.name)
            self.bookings.add("undelivered", **entry, reason=f"{type(e).__name__}: {e}")
        try:
            self.bookings.write()
        except (AutoExportError, OSError) as e:
            logger.warning("verl_autoexport: the delivery of %s is not in the journal yet: %s", outcome.version, e)

    def _retain(self) -> None:
        """Removes old versions before the outcome is reported, so that a run's end waits for it; errors are retried."""
        try:
            plan, failed = self.registry.prune(self.keep)
        except (AutoExportError, OSError) as e:
            logger.warning("verl_autoexport: old versions could not be removed: %s", e)
            return
        except Exception:  # a surplus version does no harm
            logger.exception("verl_autoexport: old versions could not be removed")
            return
        for gone in plan.removed:
            logger.info(
                "verl_autoexport: removed %s (%s): %s", gone.version.name, show_size(gone.nbytes), shown(gone.reason)
            )
        for line in (*plan.warnings, *failed):
            logger.warning("verl_autoexport: keep: %s", shown(line))

    def _settle(self, request: ExportRequest, status: str, reason: str) -> Outcome:
        logger.warning("verl_autoexport: step %s %s: %s", request.step, status, shown(reason))
        self._journal(status, request, reason=reason)
        if status == "failed" and request.hold is not None and self._is_last_copy(request):
            self._keep(request, request.hold)
        else:
            self._release(request)
        return Outcome(request.step, status, reason=reason)

    def _note_asked(self, request: ExportRequest) -> None:
        self._journal("asked", request, time=request.time, triggers=[t.to_dict() for t in request.triggers])

    def _journal(self, event: str, request: ExportRequest, **fields: Any) -> None:
        """Notes an event; if that fails now (the disk is full, a lock is held), it is written later."""
        self.bookings.add(event, step=request.step, **fields)
        try:
            self.bookings.write()
        except (AutoExportError, OSError) as e:
            logger.warning("verl_autoexport: step %s: %r is not in the journal yet: %s", request.step, event, e)

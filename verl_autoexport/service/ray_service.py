"""The exporter as a Ray actor on the driver's node, which takes no slot of CPU or GPU."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import AutoExportError
from verl_autoexport.merge.protocol import MergeRunner
from verl_autoexport.merge.ray_runner import RayRunner
from verl_autoexport.service.exporter import Exporter
from verl_autoexport.service.request import ExportRequest, Outcome
from verl_autoexport.sources.live.snapshot import Deliveries
from verl_autoexport.sources.nodes.cluster import Nodes, SpreadFiles
from verl_autoexport.sources.protocol import ShardSource

_THREADS = 64  # concurrent calls of `export` that Ray admits; each only waits


class RaySources:
    """The sources that only Ray reaches: workers' snapshots, and checkpoints on the disks of several nodes."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.deliveries = Deliveries()
        self.nodes: Nodes | None = None

    def open(self, request: ExportRequest) -> ShardSource | None:
        if request.snapshot is not None:
            return self.deliveries.whole(request.snapshot)
        return self._spread(request, request.directory) if request.spread else None

    def release(self, request: ExportRequest) -> None:
        if request.spread and request.hold is not None and self.nodes is not None:
            self.nodes.release(request.hold)
        if request.snapshot is not None:
            self.deliveries.forget(request.snapshot.fingerprint)

    def is_last_copy(self, request: ExportRequest) -> bool:
        try:
            where = (Path(str(request.origin)), Path(str(request.hold)))
            return len({self._spread(request, directory).fingerprint for directory in where}) > 1
        except AutoExportError:
            return True

    def _spread(self, request: ExportRequest, directory: Path) -> SpreadFiles:
        self.nodes = self.nodes or Nodes()
        return SpreadFiles(self.nodes, directory, self.role, request.homes)


class ExportActor(Exporter):
    """The exporter in an actor: if its process dies, Ray starts it again and repeats the unfinished calls."""

    def __init__(self, settings: AutoExportConfig, owner: str | None = None, runner: MergeRunner | None = None) -> None:
        merge, self.ray_sources = settings.merge, RaySources(settings.role)
        runner = runner or RayRunner(merge.workers, merge.num_cpus, merge.schedule_timeout_s, merge.placement)
        super().__init__(settings, runner, owner, self.ray_sources)

    def export(self, request: ExportRequest) -> Outcome:
        if request.snapshot is not None:
            self.ray_sources.deliveries.ask(request.snapshot.fingerprint)
        return super().export(request)

    def deliver(self, ident: str, rank: int, blocks: list[list[Any]] | None, reason: str | None) -> bool:
        """A worker hands over its blocks of a snapshot (nested, so that Ray passes refs), or the reason it cannot.

        False: the worker may free them. Until then it repeats the call, since a restarted actor knows nothing.
        """
        return self.ray_sources.deliveries.take(ident, rank, blocks[0] if blocks else str(reason))

    def expect(self, ident: str) -> None:
        """Announces a snapshot whose export will be requested later."""
        self.ray_sources.deliveries.ask(ident)

    def forget(self, ident: str) -> None:
        """Forgets a snapshot that will not be exported."""
        self.ray_sources.deliveries.forget(ident)


class RayExportService:
    """The service that runs an `ExportActor`; the constructor returns before the actor's process is up."""

    def __init__(self, settings: AutoExportConfig, owner: str) -> None:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = ray.remote(ExportActor).options(
            num_cpus=0, num_gpus=0, max_concurrency=_THREADS, max_restarts=-1, max_task_retries=3,
            scheduling_strategy=node,
        )  # fmt: skip
        self.receiver: Any = options.remote(settings, owner)  # its methods have a `remote`, which no type describes

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        done: Future[Outcome] = Future()

        def settle(answer: Future[Outcome]) -> None:
            try:
                done.set_result(answer.result())
            except BaseException as e:  # noqa: BLE001 - the future never raises
                reason = f"the export actor was lost: {type(e).__name__}: {e}".splitlines()[0]
                done.set_result(Outcome(request.step, "failed", reason=reason, lost=True))

        self.receiver.export.remote(request).future().add_done_callback(settle)
        return done

    def expect(self, snapshot: str) -> None:
        self.receiver.expect.remote(snapshot)

    def close(self) -> None:
        ray.kill(self.receiver)

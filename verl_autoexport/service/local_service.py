"""The exporter in this process, for use without Ray: merges run in its threads, load checks in a child."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import SourceError
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.service.exporter import Exporter
from verl_autoexport.service.request import ExportRequest, Outcome

_THREADS = 64  # requests that wait; one is exported at a time


class LocalExportService:
    """The service for checkpoints on this machine; snapshots need Ray."""

    receiver = None

    def __init__(self, settings: AutoExportConfig, owner: str | None = None) -> None:
        self.exporter = Exporter(settings, LocalRunner(settings.merge.workers), owner)
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="autoexport")

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        return self.pool.submit(self.exporter.export, request)

    def expect(self, snapshot: str) -> None:
        raise SourceError(f"snapshot {snapshot}: an exporter without Ray takes checkpoints only.")

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

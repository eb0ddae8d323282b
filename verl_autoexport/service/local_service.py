"""The exporter in this process, for use without Ray: merges run in its threads, load checks in a child."""

from __future__ import annotations

from concurrent.futures import Future

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import SourceError
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.service.exporter import Exporter
from verl_autoexport.service.request import ExportRequest, Outcome
from verl_autoexport.system.deadlines import start


class LocalExportService:
    """For checkpoints on this machine; snapshots need Ray. Its threads do not hold up the end of the process."""

    receiver = None

    def __init__(self, settings: AutoExportConfig, owner: str | None = None) -> None:
        self.exporter = Exporter(settings, LocalRunner(settings.merge.workers), owner)

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        return start(self.exporter.export, request)

    def expect(self, snapshot: str) -> None:
        raise SourceError(f"snapshot {snapshot}: an exporter without Ray takes checkpoints only.")

    def close(self) -> None:
        """Nothing to end: an export under way goes on as long as the process does."""

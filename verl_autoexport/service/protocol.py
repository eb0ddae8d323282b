"""The seam for exporting in the background."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from verl_autoexport.service.request import ExportRequest, Outcome
from verl_autoexport.sources.protocol import ShardSource


class ExportService(Protocol):
    """A service that exports one milestone after the other in the background of training."""

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        """Queues a milestone and returns at once. The future never raises: a failed export is an outcome."""
        ...

    def expect(self, snapshot: str) -> None:
        """Keeps the blocks of the snapshot with this id until its export is requested."""
        ...

    @property
    def receiver(self) -> Any:  # Ray's handles have no type of their own
        """The Ray actor that receives snapshots from workers; None if the service takes checkpoints only."""
        ...

    def close(self) -> None:
        """Ends the service; the next start of the run does the unfinished exports."""
        ...


class Sources(Protocol):
    """The weights of requests that are not files on the exporter's own node."""

    def open(self, request: ExportRequest) -> ShardSource | None:
        """The source of the weights; None if it is the files in the request's directory. Raises SourceError."""
        ...

    def release(self, request: ExportRequest) -> None:
        """Releases everything that was kept for the request beyond its hold on this node."""
        ...

    def is_last_copy(self, request: ExportRequest) -> bool:
        """Whether the weights of a spread request exist only in its hold."""
        ...


class LocalSources:
    """The sources of an exporter with no other node and no snapshots."""

    def open(self, request: ExportRequest) -> ShardSource | None:
        return None

    def release(self, request: ExportRequest) -> None:
        pass

    def is_last_copy(self, request: ExportRequest) -> bool:
        return True

"""The seam for exporting in the background."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from verl_autoexport.service.request import ExportRequest, Outcome
from verl_autoexport.sources.protocol import ShardSource


class ExportService(Protocol):
    """Exports one milestone after the other, somewhere behind training."""

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        """Queue a milestone and return at once. The future never raises: a failed export is an outcome."""
        ...

    def expect(self, snapshot: str) -> None:
        """Keep the blocks of a snapshot, by its id, although its export is asked for later."""
        ...

    @property
    def receiver(self) -> Any:  # Ray's handles have no type of their own
        """The Ray actor to which workers hand over a snapshot; None where there is none, and only checkpoints work."""
        ...

    def close(self) -> None:
        """End it; what it has not finished is left to the next start of the run."""
        ...


class Sources(Protocol):
    """The weights of requests that do not lie as files on the exporter's own node."""

    def open(self, request: ExportRequest) -> ShardSource | None:
        """None where the files in the request's directory are the source. Raises SourceError."""
        ...

    def release(self, request: ExportRequest) -> None:
        """Let go of everything that was kept for the request beyond its hold on this node."""
        ...

    def is_last_copy(self, request: ExportRequest) -> bool:
        """Whether only the hold of a spread request still has its weights."""
        ...


class LocalSources:
    """No other node, no snapshots."""

    def open(self, request: ExportRequest) -> ShardSource | None:
        return None

    def release(self, request: ExportRequest) -> None:
        pass

    def is_last_copy(self, request: ExportRequest) -> bool:
        return True

"""The seam for trainers: an adapter knows a trainer's workers and length, and reports its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from verl_autoexport.service.request import RunInfo


class TrainerAdapter(Protocol):
    """The adapter of one trainer. Only its module touches the trainer's classes; it calls `RunEvents`."""

    def info(self) -> RunInfo:
        """The facts about the run in the trainer's configuration, known before workers are up."""
        ...

    def workers(self) -> Sequence[Any]:  # Ray's handles have no type of their own
        """Handles of the Ray actors with the exported role's weights, by rank; empty if only checkpoints have them."""
        ...

    def position(self) -> int:
        """The step from which training continues: 0, or the resumed one."""
        ...

    def length(self) -> tuple[int, bool]:
        """The last step, and whether the trainer saves a checkpoint there whatever its frequency."""
        ...


class RunEvents(Protocol):
    """The events that an adapter reports from the trainer's driver. None raises into training unless configured to."""

    def begin(self) -> None:
        """The workers are up and untrained: the last moment to refuse the run, with a ConfigError or PlanError."""
        ...

    def saved(self, step: int, directory: Path) -> None:
        """The trainer has written the checkpoint of `step`."""
        ...

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """All metrics of `step` exist, and the workers still have its weights."""
        ...

    def end(self, succeeded: bool) -> None:
        """Training is over; workers are still alive."""
        ...

    def drain(self, exit_code: int) -> None:
        """The process is about to end: waits, with a limit, for pending exports, and reports their outcomes."""
        ...

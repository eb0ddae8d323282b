"""The seam for trainers: an adapter says where a trainer's workers are and how long it trains, and tells its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from verl_autoexport.service.request import RunInfo


class TrainerAdapter(Protocol):
    """One trainer. Its module is the only one that touches the trainer's classes, and calls `RunEvents`."""

    def info(self) -> RunInfo:
        """What the trainer's configuration says of the run; known before workers are up."""
        ...

    def workers(self) -> Sequence[Any]:  # Ray's handles have no type of their own
        """Handles of the Ray actors that hold the exported role's weights, by rank; none where only checkpoints do."""
        ...

    def position(self) -> int:
        """The step that training goes on from: 0, or the resumed one."""
        ...

    def length(self) -> tuple[int, bool]:
        """The last step, and whether the trainer saves a checkpoint there whatever its frequency."""
        ...


class RunEvents(Protocol):
    """An adapter calls these from the trainer's driver. None raises into training, unless the run is set to."""

    def begin(self) -> None:
        """Workers are up and nothing is trained yet: the last moment to refuse, with a ConfigError or PlanError."""
        ...

    def saved(self, step: int, directory: Path) -> None:
        """The trainer has written the checkpoint of `step`."""
        ...

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """All metrics of `step` exist, and the workers still hold its weights."""
        ...

    def end(self, succeeded: bool) -> None:
        """Training is over; workers are still alive."""
        ...

    def drain(self, exit_code: int) -> None:
        """The process is about to end: wait for what is pending, bounded, and say what became of it."""
        ...

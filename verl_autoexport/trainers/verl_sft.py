"""verl's SFT trainers: under torchrun, where rank 0 reports for all, and on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.service.process_service import ProcessExportService
from verl_autoexport.service.request import RunInfo
from verl_autoexport.trainers.verl_facts import after, first_rank, run_info

if TYPE_CHECKING:
    from verl_autoexport.trainers.watching import Run


class SftTrainer:
    """The adapter of an SFT trainer. It logs training and validation of a step apart, and saves after both."""

    logs_once = False
    waits_in_fit = False  # the other ranks leave `fit` together with this one
    service = ProcessExportService

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.config

    @staticmethod
    def reports(trainer: Any) -> bool:
        """Whether this process is the one that logs: rank 0 of a process group, or the driver on Ray."""
        return first_rank()

    def attach(self, run: Run) -> None:
        """Wraps the trainer's methods, so that they report to `run`."""
        folder = Path(self.config.trainer.default_local_dir)

        def saved(step: int) -> None:  # a barrier comes last in a save: all ranks have written
            run.saved(step, folder / f"global_step_{step}")

        after(getattr(self.trainer, "ckpt_handler", self.trainer), "save_checkpoint", saved)
        run.resumed()  # its constructor has loaded the checkpoint

    def info(self) -> RunInfo:
        return run_info(self.config, self.config.model)

    def workers(self) -> Sequence[Any]:
        return ()

    def position(self) -> int:
        return self.trainer.resume_global_step

    def length(self) -> tuple[int, bool]:
        epochs, per_epoch = self.config.trainer.total_epochs, len(self.trainer.train_dataloader)
        total = self.config.trainer.total_training_steps or per_epoch * epochs
        last_step = min(total, per_epoch * epochs)
        return last_step, last_step == total

"""verl's SFT trainers: under torchrun, where rank 0 reports for all, and on Ray."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.service.process_service import ProcessExportService
from verl_autoexport.service.request import RunInfo
from verl_autoexport.trainers.verl_facts import first_rank, local, modules, run_names

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

    def attach(self, run: Run, settings: AutoExportConfig) -> None:
        """Wraps the trainer's methods, so that they report to `run`."""
        owner = getattr(self.trainer, "ckpt_handler", self.trainer)
        save, folder = owner.save_checkpoint, Path(self.config.trainer.default_local_dir)

        @functools.wraps(save)
        def wrapped(step: int, *args: Any, **kwargs: Any) -> Any:
            result = save(step, *args, **kwargs)  # a barrier is its last line: all ranks have written
            run.saved(step, folder / f"global_step_{step}")
            return result

        owner.save_checkpoint = wrapped
        run.resumed()  # its constructor has loaded the checkpoint

    def info(self) -> RunInfo:
        model = self.config.model
        return RunInfo(
            checkpoints=Path(self.config.trainer.default_local_dir).absolute(),
            run=run_names(self.config),
            base_model=local(model.get("path") or model.get("partial_pretrain")),
            lora_adapter=local(model.get("lora_adapter_path")) if (model.get("lora_rank") or 0) > 0 else None,
            trust_remote_code=bool(model.get("trust_remote_code", False)),
            external_lib=modules(model.get("external_lib")),
        )

    def workers(self) -> Sequence[Any]:
        return ()

    def position(self) -> int:
        return self.trainer.resume_global_step

    def length(self) -> tuple[int, bool]:
        epochs, per_epoch = self.config.trainer.total_epochs, len(self.trainer.train_dataloader)
        total = self.config.trainer.total_training_steps or per_epoch * epochs
        last_step = min(total, per_epoch * epochs)
        return last_step, last_step == total

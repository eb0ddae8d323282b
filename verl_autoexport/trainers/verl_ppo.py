"""verl's PPO trainers on Ray, of every version: v1, legacy, `main_ppo_sync`, and recipes that subclass one of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.service.request import RunInfo
from verl_autoexport.trainers.verl_facts import after, local, modules, run_names

if TYPE_CHECKING:
    from verl_autoexport.trainers.watching import Run


class PpoTrainer:
    """The adapter of a PPO trainer, whose workers are Ray actors and whose `fit` runs in the driver."""

    logs_once = True
    waits_in_fit = True  # the workers die with the driver's task, soon after `fit`
    service = None  # the session's own: a Ray actor

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.role = self.config.autoexport.get("role", "actor")

    @staticmethod
    def reports(trainer: Any) -> bool:
        return True

    def attach(self, run: Run, settings: AutoExportConfig) -> None:
        """Wraps the trainer's methods, so that they report to `run`."""
        trainer, chained = self.trainer, _chained(self.config, settings.chain_callback)

        def saved() -> None:
            step = trainer.global_steps
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{step}"
            run.saved(step, folder)
            if chained is not None:
                chained.on_save(trainer=trainer, global_step=step, checkpoint_dir=str(folder), async_save=False)

        after(trainer, "_load_checkpoint", run.resumed)
        after(trainer, "_save_checkpoint", saved)

    def info(self) -> RunInfo:
        model = self.config.critic.model if self.role == "critic" else self.config.actor_rollout_ref.model
        return RunInfo(
            checkpoints=Path(self.config.trainer.default_local_dir).absolute(),
            run=run_names(self.config),
            base_model=local(model.get("path")),
            lora_adapter=local(model.get("lora_adapter_path")) if (model.get("lora_rank") or 0) > 0 else None,
            trust_remote_code=bool(model.get("trust_remote_code", False)),
            external_lib=modules(model.get("external_lib")),
        )

    def workers(self) -> Sequence[Any]:
        group = self.trainer.critic_wg if self.role == "critic" else self.trainer.actor_rollout_wg
        return group.workers

    def position(self) -> int:
        return self.trainer.global_steps

    def length(self) -> tuple[int, bool]:
        total = self.trainer.total_training_steps
        per_epoch = getattr(self.trainer, "steps_per_epoch", None) or len(self.trainer.train_dataloader)
        last_step = min(total, per_epoch * self.config.trainer.total_epochs)
        return last_step, last_step == total  # if the epochs end earlier, verl stops without a save


def _chained(config: Any, name: str | None) -> Any:
    """The user's own checkpoint callback, by its class path, made as verl makes one."""
    if name is None:
        return None
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)(config=config)

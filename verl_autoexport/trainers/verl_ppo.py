"""verl's PPO trainers on Ray, of every version: v1, legacy, `main_ppo_sync`, and recipes that subclass one of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from verl_autoexport.service.request import RunInfo
from verl_autoexport.trainers.verl_facts import after, run_info

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

    def attach(self, run: Run) -> None:
        """Wraps the trainer's methods, so that they report to `run`."""
        after(self.trainer, "_load_checkpoint", run.resumed)
        after(self.trainer, "_save_checkpoint", lambda: run.saved(self.trainer.global_steps, _folder(self.trainer)))

    def info(self) -> RunInfo:
        model = self.config.critic.model if self.role == "critic" else self.config.actor_rollout_ref.model
        return run_info(self.config, model)

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


def chain(trainer: Any) -> None:
    """Has the user's own checkpoint callback called after each save, by its class path, made as verl makes one."""
    name = OmegaConf.select(trainer.config, "autoexport.chain_callback")
    if name is None or not hasattr(trainer, "_save_checkpoint"):
        return
    module, _, cls = name.rpartition(".")
    users = getattr(importlib.import_module(module), cls)(config=trainer.config)

    def saved() -> None:
        where = {"global_step": trainer.global_steps, "checkpoint_dir": str(_folder(trainer))}
        users.on_save(trainer=trainer, async_save=False, **where)

    after(trainer, "_save_checkpoint", saved)


def _folder(trainer: Any) -> Path:
    return Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}"

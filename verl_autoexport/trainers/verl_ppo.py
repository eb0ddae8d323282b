"""verl's PPO trainer (v1): a checkpoint callback and three wrapped methods.

These facts of verl 0.9.1 are each checked by a test on the wheel: the callback is
built first in `PPOTrainer.__init__`; `on_save` comes after the shards are written;
`Tracking.log(data, step)` comes once per step after save and validation; `fit` starts
with `global_steps` at the resumed step; `Tracking.finish` comes last, workers still alive.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tracking import Tracking

from verl_autoexport.config.reading import load_config
from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.service.request import RunInfo
from verl_autoexport.trainers.session import RunSession

_active: PpoRun | None = None


class AutoExportCallback(CheckpointCallback):
    """The callback that `trainer.checkpoint_callback_class` names; verl builds it in the TaskRunner.

    The constructor raises ConfigError if the run's configuration cannot work. After that, no error of this
    package reaches training unless `on_error=raise`.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        global _active
        settings = load_config(config.autoexport)
        self.chained = _build_chained(config, settings.chain_callback)
        self.run = PpoRun(config, settings) if settings.enabled else None
        if self.run is not None:
            _active = self.run
            _wrap_verl()

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        if self.run is not None:
            self.run.session.saved(global_step, Path(checkpoint_dir))
        if self.chained is not None:
            self.chained.on_save(
                trainer=trainer, global_step=global_step, checkpoint_dir=checkpoint_dir, async_save=async_save, **kwargs
            )


class PpoRun:
    """The exported run: the adapter of verl's trainer, which is known once `fit` begins."""

    def __init__(self, config: DictConfig, settings: AutoExportConfig) -> None:
        self.config, self.role = config, settings.role
        self.fitted: PPOTrainer | None = None
        self.session = RunSession(config, settings, self)

    @property
    def trainer(self) -> PPOTrainer:
        if self.fitted is None:
            raise RuntimeError("verl's trainer is not known before its `fit` has begun; please report this.")
        return self.fitted

    def info(self) -> RunInfo:
        return _run_info(self.config, self.role)

    def workers(self) -> Sequence[Any]:
        group = self.trainer.critic_wg if self.role == "critic" else self.trainer.actor_rollout_wg
        return group.workers

    def position(self) -> int:
        return self.trainer.global_steps

    def length(self) -> tuple[int, bool]:
        total = self.trainer.total_training_steps
        last_step = min(total, self.trainer.steps_per_epoch * self.config.trainer.total_epochs)
        return last_step, last_step == total  # if the epochs end earlier, verl stops without a save

    def on_fit_begin(self, trainer: PPOTrainer) -> None:
        if not self.config.trainer.get("val_only", False):  # otherwise nothing is trained, and no past is judged
            self.fitted = trainer
            self.session.begin()

    def is_of(self, tracking: Tracking) -> bool:
        """Whether `tracking` is the logger of the exported run."""
        return self.fitted is not None and tracking is getattr(self.fitted, "logger", None)


def _build_chained(config: DictConfig, fqn: str | None) -> CheckpointCallback | None:
    return load_class_from_fqn(fqn, "CheckpointCallback")(config=config) if fqn else None


def _run_info(config: DictConfig, role: str) -> RunInfo:
    model = config.critic.model if role == "critic" else config.actor_rollout_ref.model
    trainer = config.trainer
    return RunInfo(
        checkpoints=Path(trainer.default_local_dir).absolute(),
        run={"project": trainer.project_name, "experiment": trainer.experiment_name},
        base_model=_local(model.get("path")),
        lora_adapter=_local(model.get("lora_adapter_path")) if (model.get("lora_rank") or 0) > 0 else None,
        trust_remote_code=bool(model.get("trust_remote_code", False)),
        external_lib=_modules(model.get("external_lib")),
    )


def _modules(external_lib: str | ListConfig | None) -> str | None:
    """The names of modules, separated by commas; verl takes one name, or a list."""
    return ",".join(external_lib) if isinstance(external_lib, ListConfig) else external_lib


def _local(path: str | None) -> str | None:
    """The absolute path of a local directory, since exports run in processes with another working directory."""
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().is_dir() else path


def _wrap_verl() -> None:
    """Wraps verl's methods once per process, at class level, since `fit` and the `Tracking` object do not exist yet."""
    if getattr(PPOTrainer.fit, "_autoexport", False):
        return
    fit, log, finish = PPOTrainer.fit, Tracking.log, Tracking.finish

    @functools.wraps(fit)
    def wrapped_fit(self: PPOTrainer, *args: Any, **kwargs: Any) -> Any:
        run = _active
        if run is None or getattr(self.checkpoint_callback, "run", None) is not run:
            return fit(self, *args, **kwargs)
        run.on_fit_begin(self)
        try:
            result = fit(self, *args, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # training's own error is the one to raise
                run.session.end(False)
            raise
        run.session.end(True)
        return result

    @functools.wraps(log)
    def wrapped_log(self: Tracking, data: dict[str, Any], step: int, *args: Any, **kwargs: Any) -> Any:
        result = log(self, data, step, *args, **kwargs)
        if _active is not None and _active.is_of(self):
            _active.session.logged(step, data)
        return result

    @functools.wraps(finish)
    def wrapped_finish(self: Tracking, exit_code: int = 0) -> Any:
        try:
            if _active is not None and not getattr(self, "_finished", False) and _active.is_of(self):
                _active.session.drain(exit_code)
        finally:
            result = finish(self, exit_code)
        return result

    vars(wrapped_fit)["_autoexport"] = True
    PPOTrainer.fit, Tracking.log, Tracking.finish = wrapped_fit, wrapped_log, wrapped_finish

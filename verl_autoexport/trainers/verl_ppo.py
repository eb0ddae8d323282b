"""The only module that touches verl's classes: a checkpoint callback and three wrapped methods.

Facts of verl 0.9.1 relied on here, each pinned by a test on the wheel: the callback is
built first in `PPOTrainer.__init__`; `on_save` comes after the shards are written;
`Tracking.log(data, step)` comes once per step after save and validation; `fit` starts
with `global_steps` at the resumed step; `Tracking.finish` comes last, workers still alive.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tracking import Tracking

from verl_autoexport.config.reading import load_config
from verl_autoexport.config.run_rules import check_length, check_run, choose_source
from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import ConfigError, PlanError, SourceError, shown
from verl_autoexport.model.base_compatibility import check_start
from verl_autoexport.service.controller import ExportFailed, RunController
from verl_autoexport.service.live_start import start_live
from verl_autoexport.service.request import RunInfo
from verl_autoexport.sources.live import in_worker
from verl_autoexport.sources.live.coordinator import LiveSource
from verl_autoexport.sources.nodes.cluster import Nodes, find_nodes
from verl_autoexport.system.logs import show_info

logger = logging.getLogger(__name__)
_ASK_S = 60.0
_active: AutoExportCallback | None = None


class AutoExportCallback(CheckpointCallback):
    """Named by `trainer.checkpoint_callback_class`; built by verl in the TaskRunner.

    Raises ConfigError when the run's configuration cannot work. After that nothing of ours
    raises into training unless `on_error=raise`.
    """

    def __init__(self, config: DictConfig | None = None) -> None:
        super().__init__(config)
        global _active
        self.settings: AutoExportConfig = load_config(config.autoexport)
        self.chained = _build_chained(config, self.settings.chain_callback)
        self.driver: RunController | None = None
        self.trainer: PPOTrainer | None = None
        self.drained = False
        if not self.settings.enabled:
            return
        for warning in check_run(config, self.settings):
            logger.warning("verl_autoexport: %s", shown(warning))
        self.driver = RunController(self.settings, _run_info(config, self.settings.role))
        _active = self
        show_info()
        _wrap_verl()

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        if self.driver is not None:
            self._guarded(global_step, self.driver.saved, global_step, Path(checkpoint_dir))
        if self.chained is not None:
            self.chained.on_save(
                trainer=trainer, global_step=global_step, checkpoint_dir=checkpoint_dir, async_save=async_save, **kwargs
            )

    # -- called by the wrapped methods ----------------------------------------------

    def on_fit_begin(self, trainer: PPOTrainer) -> None:
        """Workers are up, nothing is trained yet: the last moment to refuse."""
        if self.config.trainer.get("val_only", False):
            return  # nothing is trained, so nothing is exported and no past is judged
        self.trainer = trainer
        last_step = min(trainer.total_training_steps, trainer.steps_per_epoch * self.config.trainer.total_epochs)
        last_saved = last_step == trainer.total_training_steps  # if the epochs end before, verl stops without a save
        check_length(self.settings, self.config, last_step, last_saved)
        self._check_base()
        group = trainer.critic_wg if self.settings.role == "critic" else trainer.actor_rollout_wg
        self._ask_frozen(group.workers)
        live = self._live(group.workers, last_step, last_saved)
        self.driver.begin(trainer.global_steps, last_step, live, self._nodes(group.workers))

    def _ask_frozen(self, workers: Sequence[Any]) -> None:
        """Versions share what is not trained; not knowing it costs only disk."""
        try:
            names = ray.get(workers[0].__ray_call__.remote(in_worker.frozen, self.settings.role), timeout=_ASK_S)
        except ray.exceptions.RayError as e:
            logger.warning("verl_autoexport: rank 0 does not tell what is not trained: %s", e)
            return
        self.driver.info = replace(self.driver.info, frozen=names)

    def _nodes(self, workers: Sequence[Any]) -> Nodes | None:
        """Those that keep checkpoints on disks of their own. Raises ConfigError where they have other versions."""
        if self.settings.source == "live":
            return None  # no checkpoint is read
        try:
            return find_nodes(workers, self.driver.info.checkpoints)
        except (SourceError, OSError) as e:
            logger.warning("verl_autoexport: taken to share one file system, since not all workers answer: %s", e)
            return None

    def _live(self, workers: Sequence[Any], *length: Any) -> LiveSource | None:
        """The workers as the source, None where checkpoints are it; says which and why.

        Raises SourceError, PlanError, ConfigError or OSError where there can be neither.
        """
        kind, why = choose_source(self.config, self.settings)
        live = None
        if kind == "live":
            try:
                live = start_live(workers, self.settings, self.driver.info)
                why = f"{live.nbytes / 1e9:.2f} GB a snapshot, at most {live.room} in flight"
            except (SourceError, PlanError, OSError) as e:
                if self.settings.source != "auto":
                    raise
                kind, why = "checkpoint", str(e)
                self._check_without_live(why, *length)
        if live is not None and self.settings.source == "auto":
            why += "; a step that verl saves is exported from its checkpoint"
        logger.info("verl_autoexport: source=%s: %s: %s", self.settings.source, kind, why)
        return live

    def _check_without_live(self, reason: str, last_step: int, last_saved: bool) -> None:
        """Raises ConfigError where checkpoints alone leave nothing to export."""
        settings = replace(self.settings, source="checkpoint")
        try:
            check_run(self.config, settings)
            check_length(settings, self.config, last_step, last_saved)
        except ConfigError as e:
            raise ConfigError(f"autoexport.source=auto: the workers cannot be the source: {reason}\n{e}") from e

    def _check_base(self) -> None:
        """Raises PlanError or ConfigError, at any `on_error`: exports of this base model could not be right."""
        info, weights = self.driver.info, self.settings.weights
        found = check_start(
            info.base_model, weights.dtype, info.trust_remote_code, info.external_lib,
            base_check=weights.base_check, carry_unread=weights.carry_unread,
        ).to_check()  # fmt: skip
        logger.info("verl_autoexport: comparison with the base model %s: %s", found["status"], shown(found["detail"]))

    def on_log(self, tracking: Tracking, data: dict[str, Any], step: int) -> None:
        if self.trainer is not None and tracking is getattr(self.trainer, "logger", None):
            self._guarded(step, self.driver.logged, step, data)

    def on_fit_end(self, succeeded: bool) -> None:
        if self.trainer is None:
            return
        self._guarded(self.driver.logged_step, self.driver.end, succeeded)

    def on_finish(self, tracking: Tracking, exit_code: int) -> None:
        """verl's `finally`: wait for what is pending, bounded, then say what became of it."""
        if self.drained or self.trainer is None or tracking is not getattr(self.trainer, "logger", None):
            return
        self.drained = True
        queue = self.settings.queue
        timeout = queue.drain_timeout_s if exit_code == 0 else queue.drain_on_failure_s
        self._guarded(self.driver.logged_step, self._drain, timeout, exit_code == 0)

    def _drain(self, timeout_s: float, may_raise: bool) -> None:
        print(shown(self.driver.drain(timeout_s)), flush=True)
        failed = [p.outcome for p in self.driver.ledger.pending if p.outcome and p.outcome["status"] == "failed"]
        if failed and may_raise and self.settings.on_error == "raise":
            raise ExportFailed(f"step {failed[0]['step']}: {failed[0]['reason']}")

    def _guarded(self, step: int, call: Callable[..., Any], *args: Any) -> None:
        """Training goes on whatever fails in `call`, unless `on_error=raise`.

        Only configuration errors up to the first validation (an unknown metric) always stop it.
        """
        early = not self.driver.metrics_checked
        try:
            call(*args)
        except Exception as e:
            if self.settings.on_error == "raise" or (early and isinstance(e, ConfigError)):
                raise
            logger.warning(
                "verl_autoexport: %s at step %s failed; training goes on", call.__name__, step, exc_info=True
            )
            self.driver.ledger.problems.append(f"{call.__name__} at step {step} failed: {type(e).__name__}: {e}")


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
        external_lib=OmegaConf.to_container(model).get("external_lib"),
    )


def _local(path: str | None) -> str | None:
    """Absolute where it is a directory here: exports run in processes with another working directory."""
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().is_dir() else path


def _wrap_verl() -> None:
    """Once per process, at class level: `fit` and the `Tracking` object do not exist yet."""
    if getattr(PPOTrainer.fit, "_autoexport", False):
        return
    fit, log, finish = PPOTrainer.fit, Tracking.log, Tracking.finish

    @functools.wraps(fit)
    def wrapped_fit(self: PPOTrainer, *args: Any, **kwargs: Any) -> Any:
        if _active is None or self.checkpoint_callback is not _active:
            return fit(self, *args, **kwargs)
        _active.on_fit_begin(self)
        try:
            result = fit(self, *args, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # training's own error is the one to raise
                _active.on_fit_end(False)
            raise
        _active.on_fit_end(True)
        return result

    @functools.wraps(log)
    def wrapped_log(self: Tracking, data: dict[str, Any], step: int, *args: Any, **kwargs: Any) -> Any:
        result = log(self, data, step, *args, **kwargs)
        if _active is not None:
            _active.on_log(self, data, step)
        return result

    @functools.wraps(finish)
    def wrapped_finish(self: Tracking, exit_code: int = 0) -> Any:
        try:
            if _active is not None and not getattr(self, "_finished", False):
                _active.on_finish(self, exit_code)
        finally:
            result = finish(self, exit_code)
        return result

    wrapped_fit._autoexport = True
    PPOTrainer.fit, Tracking.log, Tracking.finish = wrapped_fit, wrapped_log, wrapped_finish

"""The exports of one run of any trainer: chooses the source, starts the controller, guards training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig
from ray.exceptions import RayError

from verl_autoexport.config.run_rules import check_length, check_run, choose_source
from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import ConfigError, PlanError, SourceError, shown
from verl_autoexport.model.base_compatibility import check_start
from verl_autoexport.model.transformers_api import untested
from verl_autoexport.service.controller import ExportFailed, RunController, StartService
from verl_autoexport.service.live_start import start_live
from verl_autoexport.sources.live import in_worker
from verl_autoexport.sources.live.coordinator import LiveSource
from verl_autoexport.sources.nodes.cluster import Nodes, find_nodes
from verl_autoexport.system.logs import show_info
from verl_autoexport.trainers.protocol import TrainerAdapter

logger = logging.getLogger(__name__)
_ASK_S = 60.0


class RunSession:
    """The `RunEvents` of a run with `config`, the trainer's configuration tree.

    The constructor raises ConfigError if the configuration cannot work. After that, no error of this
    package reaches training unless `on_error=raise`.
    """

    def __init__(
        self,
        config: DictConfig,
        settings: AutoExportConfig,
        adapter: TrainerAdapter,
        service: StartService | None = None,
    ) -> None:
        show_info()
        for warning in check_run(config, settings):
            logger.warning("verl_autoexport: %s", shown(warning))
        self.config, self.settings, self.adapter = config, settings, adapter
        self.controller = RunController(settings, adapter.info(), service)
        self.begun = self.drained = False

    def begin(self) -> None:
        """Starts the exports; raises ConfigError, PlanError, SourceError or OSError if the run could export nothing."""
        self.begun = True
        last_step, last_saved = self.adapter.length()
        check_length(self.settings, self.config, last_step, last_saved)
        self._check_base()
        workers = self.adapter.workers()
        live, nodes = None, None
        if workers:
            self._ask_frozen(workers)
            live = self._live(workers, last_step, last_saved)
            nodes = self._nodes(workers)
        self.controller.begin(self.adapter.position(), last_step, live, nodes)

    def saved(self, step: int, directory: Path) -> None:
        self._guarded(step, self.controller.saved, step, directory)

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        if self.begun:
            self._guarded(step, self.controller.logged, step, metrics)

    def end(self, succeeded: bool) -> None:
        if self.begun:
            self._guarded(self.controller.logged_step, self.controller.end, succeeded)

    def drain(self, exit_code: int) -> None:
        if self.drained or not self.begun:
            return
        self.drained = True
        queue = self.settings.queue
        timeout = queue.drain_timeout_s if exit_code == 0 else queue.drain_on_failure_s
        self._guarded(self.controller.logged_step, self._drain, timeout, exit_code == 0)

    def _ask_frozen(self, workers: Sequence[Any]) -> None:
        """Asks for the frozen parameters, which versions share on disk; without an answer only disk space is lost."""
        try:
            names = ray.get(workers[0].__ray_call__.remote(in_worker.frozen, self.settings.role), timeout=_ASK_S)
        except RayError as e:
            logger.warning("verl_autoexport: rank 0 did not report which parameters are frozen: %s", e)
            return
        self.controller.info = replace(self.controller.info, frozen=names)

    def _nodes(self, workers: Sequence[Any]) -> Nodes | None:
        """The nodes that keep checkpoints on disks of their own. Raises ConfigError if they have other versions."""
        if self.settings.source == "live":
            return None  # no checkpoint will be read
        try:
            return find_nodes(workers, self.controller.info.checkpoints)
        except (SourceError, OSError) as e:
            logger.warning("verl_autoexport: one shared file system is assumed, since not all workers answer: %s", e)
            return None

    def _live(self, workers: Sequence[Any], *length: Any) -> LiveSource | None:
        """The workers as the source, or None for checkpoints; logs the choice and its reason.

        Raises SourceError, PlanError, ConfigError or OSError if neither is possible.
        """
        kind, why = choose_source(self.config, self.settings)
        live = None
        if kind == "live":
            try:
                live = start_live(workers, self.settings, self.controller.info)
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
        """Raises ConfigError if checkpoints alone leave nothing to export."""
        settings = replace(self.settings, source="checkpoint")
        try:
            check_run(self.config, settings)
            check_length(settings, self.config, last_step, last_saved)
        except ConfigError as e:
            raise ConfigError(f"autoexport.source=auto: the workers cannot be the source: {reason}\n{e}") from e

    def _check_base(self) -> None:
        """Raises PlanError or ConfigError, with any `on_error`, if exports of this base model could not be right."""
        info, weights = self.controller.info, self.settings.weights
        found = check_start(
            info.base_model, weights.dtype, info.trust_remote_code, info.external_lib,
            base_check=weights.base_check, carry_unread=weights.carry_unread,
        ).to_check()  # fmt: skip
        for note in untested():
            logger.warning("verl_autoexport: %s", note)
        logger.info("verl_autoexport: comparison with the base model %s: %s", found["status"], shown(found["detail"]))

    def _drain(self, timeout_s: float, may_raise: bool) -> None:
        print(shown(self.controller.drain(timeout_s)), flush=True)
        outcomes = [p.outcome for p in self.controller.ledger.pending if p.outcome is not None]
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        if failed and may_raise and self.settings.on_error == "raise":
            raise ExportFailed(f"step {failed[0].step}: {failed[0].reason}")

    def _guarded(self, step: int, call: Callable[..., Any], *args: Any) -> None:
        """Makes a call; training continues after any failure in it, unless `on_error=raise`.

        Only a configuration error up to the first validation (an unknown metric) always stops training.
        """
        early = not self.controller.metrics_checked
        try:
            call(*args)
        except Exception as e:
            if self.settings.on_error == "raise" or (early and isinstance(e, ConfigError)):
                raise
            logger.warning(
                "verl_autoexport: %s at step %s failed; training goes on", call.__name__, step, exc_info=True
            )
            self.controller.ledger.problems.append(f"{call.__name__} at step {step} failed: {type(e).__name__}: {e}")

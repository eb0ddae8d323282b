"""A Hydra callback in verl's launching process: it installs the hook, and stops a run that could not export."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from verl_autoexport.config.reading import load_config
from verl_autoexport.config.run_rules import check_run, check_trainer
from verl_autoexport.errors import AutoExportError, ConfigError, shown
from verl_autoexport.milestones.events import is_measured
from verl_autoexport.registry.store import Registry
from verl_autoexport.trainers import hook, watching
from verl_autoexport.trainers.verl_facts import first_rank

PROGRAMS = ("main_ppo", "main_ppo_v0", "main_ppo_sync", "sft_trainer", "sft_trainer_ray", "fsdp_sft_trainer")
"""The modules of `verl.trainer` whose runs can export."""
_LOGS_S = 1.0  # Ray forwards the actors' last lines with a delay; the report must come after them


class StartupGuard(Callback):
    """Refuses an impossible run with one line and exit code 1, and prints the report as the run's last line."""

    def __init__(self) -> None:
        self.registry: Registry | None = None
        self.started = time.time()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit, since Hydra turns any other exception of a callback into a warning and continues."""
        try:
            hook.install()  # also if it is turned off, since the configuration cannot be resolved without it
            if not first_rank():
                return  # rank 0 speaks for all
            settings = load_config(config.autoexport)
            if not settings.enabled:
                return
            check_trainer(config)
            check_program()
            for warning in check_run(config, settings):
                print(shown(f"verl_autoexport: {warning}"), file=sys.stderr)
            # With a remote cluster the directory belongs to the TaskRunner's node, and is checked there.
            address = OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS", "local")
            self.registry = (Registry.create if address == "local" else Registry)(settings.output_dir)
            self.registry.check_free()
        except AutoExportError as e:
            raise SystemExit(f"verl_autoexport: {e}") from e
        except Exception as e:
            raise SystemExit(shown(f"verl_autoexport: start-up check failed: {type(e).__name__}: {e}")) from e

    def on_job_end(self, config: DictConfig, job_return: object, **kwargs: Any) -> None:
        watching.drain()
        if self.registry is None:
            return
        time.sleep(_LOGS_S)
        entries, _ = self.registry.journal_entries()
        reports = (e for e in entries if e["event"] == "report" and isinstance(e.get("line"), str))
        lines = [e["line"] for e in reports if is_measured(at := e.get("time")) and at >= self.started]
        root = self.registry.root
        ended = f"verl_autoexport: the run ended before a report; `verl-autoexport ls {root}`"
        print(shown(lines[-1] if lines else ended))


def check_program() -> None:
    """Raises ConfigError for verl's programs that train nothing, or in a way that is not known."""
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    package, _, program = name.rpartition(".")
    if name.startswith("verl.") and not (package == "verl.trainer" and program in PROGRAMS):
        raise ConfigError(
            f"{name} is no program that autoexport knows, nothing would be exported: remove +autoexport=default; "
            f"it works with verl.trainer.{{{', '.join(PROGRAMS)}}}."
        )
    if importlib.util.find_spec(hook.TRACKING) is None:
        from importlib import metadata

        raise ConfigError(
            f"verl {metadata.version('verl')} has no {hook.TRACKING}, by whose logs autoexport follows a run: install "
            "one from 0.5.0 to 0.9.1, or export finished checkpoints with `verl-autoexport export`."
        )

"""A Hydra callback in verl's launching process: before Ray starts, it stops a run that could not export."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from verl_autoexport.config.reading import load_config
from verl_autoexport.config.run_rules import check_hook, check_run
from verl_autoexport.errors import AutoExportError, ConfigError, shown
from verl_autoexport.milestones.events import is_measured
from verl_autoexport.registry.store import Registry

HOOK = "verl.trainer.ppo.checkpoint_callback"
VERSIONS_WITH_HOOK = "0.9.1"
_LOGS_S = 1.0  # Ray forwards the actors' last lines with a delay; the report must come after them


class StartupGuard(Callback):
    """Refuses an impossible run with one line and exit code 1, and prints the report as the run's last line."""

    def __init__(self) -> None:
        self.registry: Registry | None = None
        self.started = time.time()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit, since Hydra turns any other exception of a callback into a warning and continues."""
        try:
            settings = load_config(config.autoexport)
            if not settings.enabled:
                return
            check_hook(config)
            check_entry_point()
            check_verl()
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
        if self.registry is None:
            return
        time.sleep(_LOGS_S)
        entries, _ = self.registry.journal_entries()
        reports = (e for e in entries if e["event"] == "report" and isinstance(e.get("line"), str))
        lines = [e["line"] for e in reports if is_measured(at := e.get("time")) and at >= self.started]
        root = self.registry.root
        ended = f"verl_autoexport: the run ended before a report; `verl-autoexport ls {root}`"
        print(shown(lines[-1] if lines else ended))


def check_entry_point() -> None:
    """Raises ConfigError for verl's other programs, some of which read the same configuration."""
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    if name.startswith("verl.") and name != "verl.trainer.main_ppo":
        raise ConfigError(
            f"{name} never calls checkpoint callbacks, nothing would be exported: remove +autoexport=default; "
            "it works with verl.trainer.main_ppo only."
        )


def check_verl() -> None:
    """Raises ConfigError unless the installed verl builds checkpoint callbacks."""
    try:
        found = importlib.util.find_spec(HOOK)
    except ModuleNotFoundError:
        found = None
    if found is None:
        from importlib import metadata

        raise ConfigError(
            f"verl {metadata.version('verl')} has no checkpoint callback ({HOOK}): expected {VERSIONS_WITH_HOOK}. "
            "Install `verl==0.9.1`, or export finished checkpoints with `verl-autoexport export`."
        )

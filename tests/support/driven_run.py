"""A run without a trainer: the driver, actor and checkpoints are real."""

from __future__ import annotations

import shutil
from pathlib import Path

import ray

from verl_autoexport.config.reading import load_config
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.request import RunInfo

METRIC = "val-core/x/acc/mean@1"
BEST = {"metric": METRIC}


class Script:
    """A run directory, and the calls that verl would make."""

    def __init__(self, source: Path, root: Path, exports: Path | None = None) -> None:
        self.source, self.root, self.driver = source, root, None
        self.exports = exports or root / "exports"
        root.mkdir(exist_ok=True)

    @property
    def registry(self) -> Registry:
        return Registry(self.exports)

    def start(self, step: int = 0, last_step: int | None = None, keep=None, queue=None, **trigger) -> RunController:
        if self.driver is not None:
            ray.kill(self.driver.service.receiver)
        node = {"output_dir": str(self.exports), "verify": {"load": False}, "trigger": trigger}
        node |= {"keep": keep or {}, "queue": queue or {}}
        self.driver = RunController(load_config(node), RunInfo(self.root, run={}))
        self.driver.begin(step, last_step)
        return self.driver

    def saved(self, step: int) -> Path:
        """As verl leaves it, before it tells anyone."""
        target = self.root / f"global_step_{step}"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.source, target))

    def save(self, step: int) -> None:
        self.driver.saved(step, self.saved(step))

    def step(self, step: int, value: float | None = None) -> None:
        self.save(step)
        self.driver.logged(step, {} if value is None else {METRIC: value})

    def finish(self, succeeded: bool = True) -> str:
        self.driver.end(succeeded)
        return self.driver.drain(120)

    def live(self) -> dict[int, set[str]]:
        return {v.step: {t["policy"] for t in v.record.triggers} for v in self.registry.versions() if not v.superseded}

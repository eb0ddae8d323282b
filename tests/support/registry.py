"""Published versions without a model, in this process and in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from tests.support.repository import environment
from verl_autoexport.milestones.events import Trigger
from verl_autoexport.registry.record import ExportRecord
from verl_autoexport.registry.store import Registry
from verl_autoexport.system.untrusted import read_json

CREATED = "2025-01-02T03:04:05+00:00"
CREATED_UNIX = 1735787045.0
EVERY = Trigger("every_n_steps", "every 2 steps")


def best(value: float, mode: str = "max", metric: str = "val/acc", name: str = "best") -> Trigger:
    return Trigger("best", f"{metric} is {value}", name=name, metric=metric, value=value, mode=mode)


def record(at: int, *triggers: Trigger, **changes) -> ExportRecord:
    fields = {
        "version": 0, "step": at, "created_at": CREATED, "run": {"project": "p"}, "metrics": {"val/acc": 0.5},
        "triggers": tuple(t.to_dict() for t in triggers or (EVERY,)), "measured_on": None, "source": {},
        "base_model": None, "architectures": ("A",), "dtype": "bfloat16", "num_parameters": 1, "files": (),
        "verification": {}, "timings_s": {}, "versions": {},
    }  # fmt: skip
    return ExportRecord(**fields | changes)


def publish(registry: Registry, step: int, *triggers: Trigger, **changes):
    staged = registry.stage(f"step{step}")
    (staged.path / "sub").mkdir()
    (staged.path / "sub/model.safetensors").write_bytes(b"weights")
    return registry.publish(staged, record(step, *triggers, **changes))


def links(root: Path) -> dict[str, str]:
    return {p.name: os.readlink(p) for p in sorted(root.iterdir()) if p.is_symlink()}


def names(registry: Registry) -> list[str]:
    return [v.name for v in registry.versions()]


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def locked(root: Path) -> FileLock:
    """The lock of the output directory, as another program takes it."""
    return FileLock(root / ".lock")


CHILD = """
import sys, time
from tests.support.registry import *
registry = Registry(sys.argv[1])
"""


def child(root: Path, code: str) -> subprocess.Popen:
    """A process that runs `code`; `registry` is the one in `root`."""
    command = [sys.executable, "-c", CHILD + code, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())

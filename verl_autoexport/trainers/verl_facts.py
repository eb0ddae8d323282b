"""Shared by the adapters: ranks, names, paths and modules as verl's trainers have them, methods to wrap."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig


def first_rank() -> bool:
    """Whether this process is rank 0, or none; each rank of `torchrun` has its number in its environment."""
    return os.environ.get("RANK", "0") == "0"


def run_names(config: DictConfig) -> dict[str, str]:
    """The run's names in verl's logger, for `export.json`."""
    return {"project": config.trainer.project_name, "experiment": config.trainer.experiment_name}


def modules(external_lib: str | ListConfig | None) -> str | None:
    """The names of modules, separated by commas; verl takes one name, or a list."""
    return ",".join(external_lib) if isinstance(external_lib, ListConfig) else external_lib


def local(path: str | None) -> str | None:
    """The absolute path of a local directory, since exports run in processes with another working directory."""
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().is_dir() else path


def after(owner: Any, name: str, report: Callable[..., None]) -> None:
    """Calls `report` after each call of the method `name` of one object that returns."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        report()
        return result

    setattr(owner, name, wrapped)

"""Shared by the adapters: ranks, and the facts about a run as verl's trainers have them; methods to wrap."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from verl_autoexport.service.request import RunInfo


def first_rank() -> bool:
    """Whether this process is rank 0, or not under torchrun, which puts the rank into the environment."""
    return os.environ.get("RANK", "0") == "0"


def run_info(config: DictConfig, model: DictConfig) -> RunInfo:
    """The facts about a run; `model` is the node of the exported role's model, with its path and its LoRA."""
    trainer = config.trainer
    return RunInfo(
        checkpoints=Path(trainer.default_local_dir).absolute(),
        run={"project": trainer.project_name, "experiment": trainer.experiment_name},
        base_model=local(model.get("path") or model.get("partial_pretrain")),  # the latter in `fsdp_sft_trainer`
        lora_adapter=local(model.get("lora_adapter_path")) if (model.get("lora_rank") or 0) > 0 else None,
        trust_remote_code=bool(model.get("trust_remote_code", False)),
        external_lib=modules(model.get("external_lib")),
    )


def modules(external_lib: str | ListConfig | None) -> str | None:
    """The names of modules, separated by commas; verl takes one name, or a list."""
    return ",".join(external_lib) if isinstance(external_lib, ListConfig) else external_lib


def local(path: str | None) -> str | None:
    """The absolute path of a local directory, since exports run in processes with another working directory."""
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().is_dir() else path


def after(owner: Any, name: str, report: Callable[..., None]) -> None:
    """Calls `report` with the same arguments after each call of the method `name` of one object that returns."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        report(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)

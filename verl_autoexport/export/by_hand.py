"""Checks of the names that a person gives for an export by hand, before any reading: a slip is an error, not a note."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from verl_autoexport.errors import ConfigError
from verl_autoexport.model.base_model import base_directory
from verl_autoexport.model.lora.peft_config import CONFIG_NAME

_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def check_base(base_model: str, only_named: bool) -> None:
    """Raises ConfigError unless it is a model's directory, or the id of a model in the local Hugging Face cache.

    `only_named`: the id is only recorded, so the model need not be on this machine.
    """
    directory = Path(base_model).expanduser()
    if not directory.is_dir():
        if _ID.fullmatch(base_model) and (only_named or base_directory(base_model)):
            return
        beside = directory.parent
        names = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
        near = [str(beside / name) for name in difflib.get_close_matches(directory.name, names)]
        raise ConfigError(
            f"--base-model {base_model}: no such directory"
            + (", and no model of this name in the local Hugging Face cache" if _ID.fullmatch(base_model) else "")
            + (f"; there is {', '.join(near)}" if near else "")
            + "."
        )
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any(name.endswith((".safetensors", ".bin")) for name in os.listdir(directory)):
        missing.append("model.safetensors")
    if missing:
        raise ConfigError(f"--base-model {directory}: not a model's directory: {' and '.join(missing)} missing.")


def check_lora_config(path: Path) -> None:
    """Raises ConfigError unless the file exists."""
    file = path / CONFIG_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"--lora-config {file}: no such file; expected the {CONFIG_NAME} that training began with.")

"""The settings of a LoRA beyond names and shapes: verl's `lora_train_meta.json`, or PEFT's `adapter_config.json`.

verl up to 0.7 saves the latter, in `lora_adapter/`, with the attributes of PEFT's object as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.system.untrusted import read_json

CONFIG_NAME = "adapter_config.json"
META_NAME = "lora_train_meta.json"
_CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": None, "revision": None, "task_type": None,
    "inference_mode": True, "r": 0, "lora_alpha": 0, "target_modules": [], "exclude_modules": None,
    "modules_to_save": None, "bias": "none", "lora_bias": False, "lora_dropout": 0.0, "fan_in_fan_out": False,
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
}  # fmt: skip
"""The keys of an adapter's configuration that matter here, with PEFT's defaults."""
_HARMLESS = {
    "peft_version", "megatron_core", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config",
    "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base weights too


def read_settings(checkpoint: Path, given: Path | None) -> tuple[dict[str, Any], str]:
    """PEFT's configuration from `given`, else from beside the shards, else from verl's few numbers; and its place."""
    meta_path = checkpoint / META_NAME
    meta = _json(meta_path) if meta_path.is_file() else None
    places = [checkpoint / folder / CONFIG_NAME for folder in ("", "huggingface", "lora_adapter")]
    if given is not None:
        places = [given / CONFIG_NAME if given.is_dir() else given]
    path = next((p for p in places if p.is_file()), None)
    if path is None and given is not None:
        raise PlanError(f"{places[0]}: not found; expected the {CONFIG_NAME} that this run's adapter began with.")
    said = meta if path is None else _check_config(_json(path), path)
    if said is None:
        raise PlanError(
            f"{meta_path}: not found, so lora_alpha is unknown, and without it LoRA cannot be scaled. Give the "
            f"adapter's {CONFIG_NAME} (`--lora-config`)."
        )
    settings = {**_CONFIG, **said}
    if meta and path and any(int(settings[k]) != meta.get(k) for k in ("r", "lora_alpha")):
        raise PlanError(f"{path}: r={settings['r']}, lora_alpha={settings['lora_alpha']}; {meta_path} says {meta}.")
    if not settings["r"] or not settings["lora_alpha"]:
        raise PlanError(
            f"{path or meta_path}: r={settings['r']}, lora_alpha={settings['lora_alpha']}; neither can be 0. verl cuts "
            f"fractions off; give the adapter's own {CONFIG_NAME} (`--lora-config`)."
        )
    return settings, str(path or meta_path)


def _check_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    known = {k: config[k] for k in _CONFIG if config.get(k) is not None}
    unknown = {k: v for k, v in config.items() if k not in _CONFIG and k not in _HARMLESS and v}
    if config.get("peft_type") != "LORA" or unknown:
        raise PlanError(f"{path}: {config.get('peft_type')} with {unknown} is not supported; only LoRA without it is.")
    if known.get("init_lora_weights") not in (None, *_INITS):
        raise PlanError(
            f"{path}: init_lora_weights={known['init_lora_weights']} changes the base weights: unsupported."
        )
    return known


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as e:
        raise PlanError(f"{path}: not readable as JSON: {e}") from e


def scaling(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scaling of a module by PEFT's rules; keys of patterns match as suffixes."""
    r, alpha = (
        next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)
        for pattern, default in (
            (settings["rank_pattern"], settings["r"]),
            (settings["alpha_pattern"], settings["lora_alpha"]),
        )
    )
    return r, alpha / math.sqrt(r) if settings["use_rslora"] else alpha / r


def write_config(config: Mapping[str, Any], base_model: str | None, directory: Path) -> None:
    """Writes `adapter_config.json` in PEFT's form."""
    path = Path(base_model).expanduser() if base_model else None
    name = str(path.absolute()) if path is not None and path.is_dir() else base_model
    config = {**config, "base_model_name_or_path": name or config["base_model_name_or_path"]}
    directory.mkdir(exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")

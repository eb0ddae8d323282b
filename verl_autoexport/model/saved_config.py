"""The run's saved configuration without the parts that contradict its weights, settled before anything is written.

verl saves the configuration that a model was loaded with. Parts that no longer apply to the
trained weights are left out, with a note, or refused with advice.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from verl_autoexport.config.schema import ExportOptions
from verl_autoexport.errors import PlanError, SourceError
from verl_autoexport.model import custom_code
from verl_autoexport.model.asset_facts import WEIGHTS
from verl_autoexport.model.base_model import base_directory
from verl_autoexport.model.model_class import first_architecture, load_class
from verl_autoexport.shards.manifest import FLOATING, ShardManifest
from verl_autoexport.system.untrusted import read_json

_CONFIG = "config.json"
_QUANTIZED = ("quantization_config", "compression_config")
_QUANTIZED_NAMES = (
    "weight_scale", "weight_scale_inv", "input_scale", "weight_zero_point", ".qweight", ".qzeros", ".absmax",
    ".quant_map", "weight_packed",
)  # fmt: skip


@contextmanager
def settled(options: ExportOptions, saved: Path, manifest: ShardManifest) -> Iterator[tuple[Path, list[str]]]:
    """Yields `saved`, or a temporary copy that agrees with the weights, and notes on the differences.

    Raises PlanError if they cannot agree.
    """
    try:
        config = read_json(saved / _CONFIG)
    except (OSError, ValueError):
        yield saved, []  # the next reader reports the problem
        return
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="verl-autoexport-") as folder:
        changed = _without_quantization(config, manifest, options, saved, notes)
        changed, code = _with_code(changed, options, saved, notes)
        changed = _with_architecture(changed, saved, notes)
        if changed != config or code:
            saved = _copied(saved, Path(folder) / "huggingface", changed, code)
        yield saved, notes


def _copied(saved: Path, directory: Path, config: Mapping[str, Any], code: Mapping[Path, Path]) -> Path:
    """A copy of the run's saved files, without weights, with this configuration and code."""

    def ignored(folder: str, names: list[str]) -> set[str]:  # no write may go through a link
        return {name for name in names if name.endswith(WEIGHTS) or Path(folder, name).is_symlink()}

    try:
        shutil.copytree(saved, directory, ignore=ignored)
        for path in code:
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(code[path], target)
        (directory / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    except OSError as e:
        raise SourceError(f"{saved}: cannot be copied to {directory}: {e}") from e
    return directory


def _without_quantization(
    config: Mapping[str, Any], manifest: ShardManifest, options: ExportOptions, saved: Path, notes: list[str]
) -> dict[str, Any]:
    """Removes the quantization: the trained weights are plain numbers, which an engine would otherwise misread."""
    nested = {key: node for key, node in config.items() if isinstance(node, dict) and key.endswith("_config")}
    found = [key for node in (config, *nested.values()) for key in _QUANTIZED if node.get(key)]
    if not found or options.lora == "adapter":
        return dict(config)
    for name, tensor in manifest.tensors.items():
        if tensor.dtype.startswith(("float8", "int8", "uint8")) or name.endswith(_QUANTIZED_NAMES):
            raise PlanError(
                f"{saved / _CONFIG}: {found[0]}, and {name} is {tensor.dtype}: quantized weights are not "
                "exported. Train a dequantized copy of the model, or export the LoRA adapter alone (lora: adapter)."
            )
    dtypes = sorted({t.dtype for t in manifest.tensors.values() if t.dtype in FLOATING})
    notes.append(f"{found[0]} is left out of config.json: the trained weights are not quantized ({', '.join(dtypes)})")
    plain = {key: {k: v for k, v in node.items() if k not in _QUANTIZED} for key, node in nested.items()}
    return {key: plain.get(key, value) for key, value in config.items() if key not in _QUANTIZED}


def _with_code(
    config: dict[str, Any], options: ExportOptions, saved: Path, notes: list[str]
) -> tuple[dict[str, Any], Mapping[Path, Path]]:
    """Leaves an `auto_map` with existing code: the run's, the base model's with its files, or none if not needed."""
    auto_map = custom_code.localized(config.get("auto_map") or {}, saved)
    if not isinstance(auto_map, Mapping) or not (lost := custom_code.broken(auto_map, saved)):
        return (config | {"auto_map": auto_map}) if auto_map and isinstance(auto_map, Mapping) else config, {}
    base = base_directory(options.base_model)
    theirs: Any = {}
    if base is not None:
        with suppress(OSError, ValueError):
            theirs = custom_code.localized(read_json(base / _CONFIG).get("auto_map") or {}, base)
    if base is not None and theirs and not custom_code.broken(theirs, base):
        files = custom_code.files([theirs], base)
        notes.append(f"auto_map is the base model's: the run's leads to {lost[0]}, which the run did not save")
        return config | {"auto_map": theirs}, {path.relative_to(base): path for path in files}
    if _known_to_transformers(config):
        notes.append(f"auto_map is left out of config.json: {lost[0]} was not saved, and transformers has the class")
        return {key: value for key, value in config.items() if key != "auto_map"}, {}
    raise PlanError(
        f"{saved / _CONFIG}: auto_map leads to {lost[0]}, which is not beside it: no reader could load the "
        "model. Name the directory of the model that was trained, with its code (--base-model, the run's model path)."
    )


def _with_architecture(config: dict[str, Any], saved: Path, notes: list[str]) -> dict[str, Any]:
    """Sets `architectures` to the class that `model_type` means, if it names one of another type."""
    if config.get("auto_map") or not _known_to_transformers(config):
        return config
    try:
        right = load_class(saved).__name__
    except PlanError:  # the planner reports this
        return config
    said = first_architecture(config["architectures"])
    if right == said:
        return config
    notes.append(f"architectures is {right} instead of {said}: model_type is {config['model_type']!r}")
    return config | {"architectures": [right]}


def _known_to_transformers(config: Mapping[str, Any]) -> bool:
    import transformers

    names = config.get("architectures")
    first = first_architecture(names) if isinstance(names, list) and names else ""
    return first[:1].isupper() and hasattr(transformers, first)

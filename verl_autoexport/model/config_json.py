"""The base model's own `config.json`, changed only where training or the export changed something.

transformers rewrites a configuration in the style of its own version, which engines with
an older one may misread. They can read the base's file; to prove that the changed file
still means the trained model, it is read back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from verl_autoexport.model.base_model import BaseModel
from verl_autoexport.model.model_class import load_config
from verl_autoexport.model.skeleton import Skeleton

_DTYPE_KEYS = ("dtype", "torch_dtype")
_NOT_THE_MODEL = frozenset({
    *_DTYPE_KEYS, "transformers_version", "_name_or_path", "use_cache", "_attn_implementation_autoset",
    "bos_token_id", "eos_token_id", "pad_token_id",  # verl replaces the model's by the tokenizer's
    "classifier_dropout", "hidden_dropout", "summary_dropout_prob",  # verl sets them to zero for a value model
})  # fmt: skip
"""Keys unrelated to the weights: the base's values stay."""
_CONFIG_NAME = "config.json"
_OLD_ROPE = {
    "rope_theta": ("rope_theta", "rotary_emb_base", "global_rope_theta"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rotary_percentage"),
}
"""Keys of `rope_parameters` that used to be separate keys, by their former names."""


def write_base_config(skeleton: Skeleton, dtype: str | None, base: BaseModel, target: Path) -> str | None:
    """Writes the base's `config.json` for the trained model over the one in `target`.

    `dtype` is torch's name, or None to keep the base's own.
    If the base's file cannot express the trained model, the one in `target` stays
    unchanged, and the key in question is returned.
    """
    path, config, trusted = target / _CONFIG_NAME, skeleton.config, skeleton.trust_remote_code
    before = path.read_text(encoding="utf-8")
    wanted = plain(config.to_dict()) | {"architectures": [skeleton.name]}
    known = plain(load_config(base.directory, trusted, named=False).to_dict())
    changed = overlay(base.config, known, wanted, _aliases(config), _is_old(base.config))
    if dtype is not None:
        set_dtype(changed, dtype)
    path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    differ = list(differences(plain(load_config(target, trusted).to_dict()), wanted))
    if differ:
        path.write_text(before, encoding="utf-8")
        return differ[0]
    return None


def overlay(
    file: Mapping[str, Any],
    known: Mapping[str, Any],
    wanted: Mapping[str, Any],
    aliases: Mapping[str, frozenset[str]] = MappingProxyType({}),
    old: bool = False,
) -> dict[str, Any]:
    """The `file` with the changes from `known`, as transformers reads it, to `wanted`, in its own spelling. Pure.

    `aliases` are other names of a key; `old`: the file spells rope as transformers 4 does.
    """
    changed = copy.deepcopy(dict(file))
    for key in (known.keys() | wanted.keys()) - _NOT_THE_MODEL:
        before, after = known.get(key), wanted.get(key)
        if before == after:
            continue
        spelled = next((name for name in (key, *aliases.get(key, ())) if name in file), key)
        if key not in wanted:
            changed.pop(spelled, None)
        elif key == "rope_parameters" and old and isinstance(after, Mapping):
            _set_old_rope(changed, before if isinstance(before, Mapping) else {}, after)
        elif isinstance(before, Mapping) and isinstance(after, Mapping) and isinstance(file.get(spelled), Mapping):
            changed[spelled] = overlay(file[spelled], before, after, aliases, old)
        elif key == "text_config" and key not in file and isinstance(after, Mapping):
            # Older files mix the text model's keys with the others.
            flat = {k for k in (before or {}) if k in file}
            changed |= overlay({k: file[k] for k in flat}, before or {}, after, aliases, old)
        else:
            changed[spelled] = after
    return changed


def _is_old(file: Mapping[str, Any]) -> bool:
    """Whether a file has the style of transformers 4."""
    new = str(file.get("transformers_version", "")).startswith("5")
    return not new and not any("rope_parameters" in node for node in _nodes(dict(file)))


def _aliases(config: Any) -> dict[str, frozenset[str]]:
    """Other names that a configuration, and those nested in it, accept for a key."""
    found: dict[str, set[str]] = {}
    nested = (value for value in vars(config).values() if hasattr(value, "attribute_map"))
    for node in (config, *nested):
        for alias, own in (getattr(node, "attribute_map", None) or {}).items():
            found.setdefault(own, set()).add(alias)
            found.setdefault(alias, set()).add(own)
    return {key: frozenset(names) for key, names in found.items()}


def _set_old_rope(file: dict[str, Any], known: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Replaces the value `known` of `rope_parameters` by `rope`, as transformers 4 reads it. In place.

    With one value for each type of layers (Gemma 3, ModernBERT), transformers 4 has separate keys for
    the base frequencies, and scales only full attention.
    """
    if isinstance(local := rope.get("sliding_attention"), Mapping):
        file |= dict.fromkeys(_spelled(file, "rope_local_base_freq", "local_rope_theta"), local.get("rope_theta"))
    before, scaling = (dict(full if isinstance(full := r.get("full_attention"), Mapping) else r) for r in (known, rope))
    for key, older in _OLD_ROPE.items():
        if key in scaling and (value := scaling.pop(key)) != before.get(key):
            file |= dict.fromkeys(_spelled(file, *older), value)
    if scaling.keys() - {"rope_type", "type"} or scaling.get("rope_type", "default") != "default":
        file["rope_scaling"] = scaling
    elif file.get("rope_scaling") is not None:
        file["rope_scaling"] = None


def _spelled(file: Mapping[str, Any], *names: str) -> list[str]:
    """The `names` in the file, any of which transformers may read; without any, the first."""
    return [name for name in names if name in file] or [names[0]]


def set_values(config: Any, values: Mapping[str, Any]) -> None:
    """Sets `values`, by dotted key, in a transformers configuration, where it has such a node. In place."""
    for key, value in values.items():
        *path, leaf = key.split(".")
        node = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
        if node is not None:
            node.update({leaf: value})  # works for dictionaries and configurations


def set_dtype(file: dict[str, Any], dtype: str) -> None:
    """Sets every dtype in `file`, nested ones too, in its spelling; adds one at the top if there was none. In place."""
    spelled = [key for node in _nodes(file) for key in _DTYPE_KEYS if key in node]
    new = str(file.get("transformers_version", "")).startswith("5")
    file.setdefault(spelled[0] if spelled else _DTYPE_KEYS[0 if new else 1], dtype)
    for node in _nodes(file):
        for key in _DTYPE_KEYS:
            if key in node:
                node[key] = dtype


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted keys, among those that describe the model, in which two configurations differ."""
    rope = wanted.get("rope_parameters") or {}
    said_there = {name for key, older in _OLD_ROPE.items() if key in rope for name in older}
    for key in sorted((found.keys() | wanted.keys()) - _NOT_THE_MODEL - said_there):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key}"


def _nodes(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The `file` and every configuration nested in it."""
    yield file
    for key, value in file.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _nodes(value)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in JSON's types: keys are texts, tuples are lists."""
    return json.loads(json.dumps(config, default=str))

"""Reads options by the schema's types, rules and near names, and refuses everything else.

Rules about several keys are here; those that need the run's own keys are in `run_rules`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_autoexport.config.schema import (
    ROOT,
    AutoExportConfig,
    BestConfig,
    ExportOptions,
    ThresholdConfig,
    refused,
    show,
)
from verl_autoexport.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def load_config(node: DictConfig | Mapping[str, Any]) -> AutoExportConfig:
    """Checks the node `autoexport` and returns it with types, defaults and absolute paths.

    Raises ConfigError naming the key, the value, the expected value and the remedy.
    """
    config = _read(AutoExportConfig, _plain(node), ROOT)
    _check_best(config.trigger.best)
    _check_threshold(config.trigger.threshold)
    if config.verify.load is False and config.verify.generate is True:
        raise ConfigError(f"{ROOT}.verify.generate=true needs {ROOT}.verify.load=true or auto; found load=false.")
    if config.weights.carry_unread and config.weights.base_check == "off":
        raise ConfigError(
            f"{ROOT}.weights.carry_unread=true needs the comparison with the base model; found "
            f"{ROOT}.weights.base_check=off."
        )
    if config.keep.best is not None and not config.trigger.best:
        raise ConfigError(f"{ROOT}.keep.best={config.keep.best} needs {ROOT}.trigger.best, whose metric it ranks by.")
    return config


def _plain(node: Any) -> Any:
    """The `node` without interpolations; `_read` refuses anything but a mapping."""
    if not isinstance(node, Mapping):
        return node
    try:
        node = node if isinstance(node, DictConfig) else OmegaConf.create(dict(node))
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        key = f"{ROOT}.{(e.full_key or '').removeprefix(f'{ROOT}.')}"
        raise ConfigError(f"{key} has no value: {str(e).splitlines()[0]}. Set it.") from e


def read_options(**given: Any) -> ExportOptions:
    """The options of one export, from values that a person gives; raises ConfigError naming the option."""
    hints, fields = get_type_hints(ExportOptions), {f.name: f for f in dataclasses.fields(ExportOptions)}
    values = {
        n: v if n == "verify" else _read_field(ExportOptions, fields[n], hints[n], v, n) for n, v in given.items()
    }
    return ExportOptions(**values)


def _read(cls: type, data: Any, key: str) -> Any:
    """An instance of the dataclass `cls` from the mapping `data` found at `key`."""
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(data, Mapping):
        raise refused(key, data, f"a mapping (keys: {', '.join(fields)})")
    values = {}
    for name, value in data.items():
        if name not in fields:
            raise _unknown(str(name), key, list(fields))
        values[name] = _read_field(cls, fields[name], hints[name], value, f"{key}.{name}")
    for f in fields.values():
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key}.{f.name} is required and not set.")
    return cls(**values)


def _read_field(cls: type, f: dataclasses.Field, hint: Any, value: Any, key: str) -> Any:
    if _is_mapping(hint):
        return _read(hint, value, key)
    item = (*get_args(hint), None)[0]
    if _is_mapping(item):
        if isinstance(value, list):
            return tuple(_read(item, v, f"{key}[{i}]") for i, v in enumerate(value))
        return () if value is None else (_read(item, value, key),)
    convert = f.metadata.get("convert")
    if convert and not (value is None and f.default is None):
        return convert(value, key)
    value = _typed(cls, f.name, hint, value, key)
    for v in value if isinstance(value, tuple) else (value,):
        _check_rule(f, v, key)
    return value


def _is_mapping(hint: Any) -> TypeGuard[type]:
    """Whether a value of this type is given as a mapping: one of the schema's dataclasses."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _typed(cls: type, name: str, hint: Any, value: Any, key: str) -> Any:
    """The `value` in the field's type; OmegaConf converts it, except for two liberties that it takes."""
    kind = next((e for t, e in _EXPECTED if hint == t or t in get_args(hint)), str(hint))
    if isinstance(value, str) and value and str in (hint, *get_args(hint)) and bool not in get_args(hint):
        return value  # OmegaConf would take `${` in it for an interpolation; a run's own are resolved already
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)  # frozen dataclasses become read-only nodes
    try:
        if (hint is bool and not isinstance(value, bool | str)) or (hint is str and not isinstance(value, str)):
            raise ValueError  # OmegaConf would take 5 as true, and make "5" of 5
        schema[name] = value
        typed = schema[name]
    except (OmegaConfBaseException, ValueError) as e:
        raise refused(key, value, kind) from e
    if isinstance(typed, ListConfig):
        return tuple(sorted(set(typed)))
    if isinstance(typed, float) and not math.isfinite(typed):
        raise refused(key, value, "a finite number")
    if typed == "":
        raise refused(key, value, kind)
    return typed


_EXPECTED: tuple[tuple[Any, str], ...] = (
    (tuple[int, ...], "a list of whole numbers such as [10, 50]"),
    (bool | str, "one of true | false | auto"),
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "a text"),
)


def _check_rule(f: dataclasses.Field, value: Any, key: str) -> None:
    one_of, least, above = (f.metadata.get(k) for k in ("one_of", "least", "above"))
    if value is None:
        return
    if one_of and value not in one_of:
        raise refused(key, value, f"one of {' | '.join(v if isinstance(v, str) else show(v) for v in one_of)}")
    if least is not None and value < least:
        raise refused(key, value, f"{least} or more")
    if above is not None and value <= above:
        raise refused(key, value, f"more than {above}")


def _check_best(best: Iterable[BestConfig]) -> None:
    seen: set[str] = set()
    for b in best:
        key = f"{ROOT}.trigger.best.name"
        if not _NAME.fullmatch(b.name) or b.name.strip(".") == "":
            raise refused(key, b.name, "at most 100 letters, digits, '_', '.' and '-'", "It becomes a file name.")
        if b.name in seen:
            raise refused(key, b.name, "a different name for each entry", "Two have this one.")
        seen.add(b.name)


def _check_threshold(threshold: Iterable[ThresholdConfig]) -> None:
    seen: set[str] = set()
    for t in threshold:
        if (t.above is None) == (t.below is None):
            found = f"above={show(t.above)} and below={show(t.below)}"
            raise ConfigError(f"{ROOT}.trigger.threshold ({t.metric}): expected one of above, below; found {found}.")
        if t.name in seen:
            raise refused(f"{ROOT}.trigger.threshold", t.name, "each threshold once", "Two are the same.")
        seen.add(t.name)


def _unknown(name: str, key: str, valid: list[str]) -> ConfigError:
    near = [f"{key}.{n}" for n in difflib.get_close_matches(name, valid, n=2)]
    near = near or [full for full in _all_keys() if full.rsplit(".", 1)[1] == name]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"{key}.{name} is not a key.{hint} Keys of {key}: {', '.join(valid)}.")


def _all_keys(cls: type = AutoExportConfig, key: str = ROOT) -> Iterable[str]:
    for name, hint in get_type_hints(cls).items():
        yield f"{key}.{name}"
        for part in (hint, *get_args(hint)):
            if _is_mapping(part):
                yield from _all_keys(part, f"{key}.{name}")

"""The `autoexport` node as frozen dataclasses; whatever is not understood is refused.

A rule about one key stands beside its field, a rule about several in `_check_*`. Rules that
need the run's own keys are in `preflight`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_autoexport.errors import ConfigError

ROOT = "autoexport"
_UNIT_NAMES = "B KB MB GB TB KiB MiB GiB TiB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def may_be_val(metric: str) -> bool:
    """Whether a metric's name or glob can match a `val-*` metric, the only ones that measure the exported weights."""
    literal = re.split(r"[*?[]", metric)[0]
    return metric.startswith("val-") or (literal != metric and "val-".startswith(literal))


def parse_size(value: Any, key: str) -> int:
    """Bytes in `value`: an int, or a string such as `5GB`, `1.5 TB`, `512MiB`. `key` is for the error."""
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(Decimal(match[1]) * _UNITS.get(match[2].upper(), 0))
    if size < 1:
        raise _refused(key, value, "a size such as 5GB or 512MiB", f"Units: {_UNIT_NAMES}; none means bytes.")
    return size


def _directory(value: Any, key: str) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise _refused(key, value, "the path of a directory")
    if _URL.match(str(value)):
        raise _refused(key, value, "a directory that this node can reach", "URLs are not: upload afterwards.")
    return Path(os.path.abspath(os.path.expanduser(value)))


def _class_path(value: Any, key: str) -> str:
    if not isinstance(value, str) or not _CLASS.fullmatch(value):
        raise _refused(key, value, "a class as package.module.Class")
    if value.startswith("verl_autoexport."):
        raise _refused(key, value, "your own callback", "This package's is called anyway.")
    return value


def _placement(value: Any, key: str) -> dict[str, dict[str, Any]]:
    """`resources`: name → amount, `labels`: name → value, both of Ray."""
    expected = "{resources: {name: amount}} and/or {labels: {name: value}} of Ray nodes"
    if not isinstance(value, Mapping) or not value or not value.keys() <= {"resources", "labels"}:
        raise _refused(key, value, expected)
    for kind, types in (("resources", (int, float)), ("labels", (str,))):
        entries = value.get(kind) or {}
        if not isinstance(entries, Mapping):
            raise _refused(f"{key}.{kind}", entries, expected)
        for name, entry in entries.items():
            if not isinstance(name, str) or isinstance(entry, bool) or not isinstance(entry, types):
                raise _refused(f"{key}.{kind}.{name}", entry, expected)
            if name in ("CPU", "GPU", "memory") or (kind == "resources" and entry <= 0):
                raise _refused(f"{key}.{kind}.{name}", entry, "a resource of your own, and more than 0 of it")
    return {kind: dict(value.get(kind) or {}) for kind in ("resources", "labels")}


def _rule(
    default: Any,
    *,
    one_of: tuple[Any, ...] = (),
    least: float | None = None,
    above: float | None = None,
    convert: Callable[[Any, str], Any] | None = None,
) -> Any:
    """A field with its rule: an enumeration, a bound, or a reader of its own."""
    rule = {"one_of": one_of, "least": least, "above": above, "convert": convert}
    return field(default=default, metadata=rule)


def _size(default: str | None) -> Any:
    return _rule(default and parse_size(default, "default"), convert=parse_size)


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """A milestone whenever `metric` is better than ever by more than `min_delta`."""

    metric: str
    mode: str = _rule("max", one_of=("max", "min"))
    min_delta: float = _rule(0.0, least=0)
    name: str = "best"


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """A milestone when `metric` is above (or below) a value; only the first time if `once`."""

    metric: str
    above: float | None = None
    below: float | None = None
    once: bool = True

    @property
    def name(self) -> str:
        sign, value = ("<", self.below) if self.above is None else (">", self.above)
        return f"{self.metric}{sign}{value:.12g}"


@dataclass(frozen=True, kw_only=True)
class TriggerConfig:
    """Which steps become milestones."""

    every_n_steps: int | None = _rule(None, least=1)
    at_steps: tuple[int, ...] = _rule((), least=1)
    every_seconds: float | None = _rule(None, above=0)
    on_save: bool = False
    on_train_end: bool = True
    on_request: bool = True
    best: tuple[BestConfig, ...] = ()
    threshold: tuple[ThresholdConfig, ...] = ()
    min_steps_between: int = _rule(0, least=0)

    @property
    def metrics(self) -> tuple[tuple[str, str], ...]:
        """Key and pattern of every metric that a trigger looks at."""
        entries = [("best", b.metric) for b in self.best] + [("threshold", t.metric) for t in self.threshold]
        return tuple((f"{ROOT}.trigger.{kind}.metric", metric) for kind, metric in entries)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """What the exported files hold; sizes are in bytes."""

    dtype: str = _rule("bfloat16", one_of=("bfloat16", "float16", "float32", "base", "source"))
    max_shard_size: int = _size("5GB")
    lora: str = _rule("fused", one_of=("fused", "adapter", "both"))
    base_check: str = _rule("strict", one_of=("strict", "warn", "off"))
    carry_unread: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Checks before publication; `auto` is skipped above `max_memory` bytes."""

    load: bool | str = _rule("auto", one_of=(True, False, "auto"))
    generate: bool | str = _rule("auto", one_of=(True, False, "auto"))
    max_memory: int = _size("16GiB")
    timeout_s: float = _rule(600.0, least=0)


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Which versions stay: what any key keeps; nothing is removed while none is set. `max_bytes` limits all."""

    last: int | None = _rule(None, least=1)
    best: int | None = _rule(None, least=1)
    every_n_steps: int | None = _rule(None, least=1)
    max_bytes: int | None = _size(None)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Resources of the merge; `workers` null means chosen from the machine."""

    workers: int | None = _rule(None, least=1)
    num_cpus: float = _rule(1.0, above=0)
    memory_budget: int = _size("1GiB")
    schedule_timeout_s: float = _rule(30.0, least=0)
    placement: dict[str, Any] | None = field(default=None, metadata={"convert": _placement})


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """What happens when milestones come faster than exports, and how long the end waits."""

    overflow: str = _rule("coalesce", one_of=("coalesce", "wait", "skip"))
    wait_timeout_s: float = _rule(600.0, least=0)
    inflight_bytes: int | None = _size(None)
    device_clone: bool = False
    stall_timeout_s: float = _rule(60.0, above=0)
    stage_timeout_s: float = _rule(1800.0, above=0)
    drain_timeout_s: float = _rule(3600.0, least=0)
    drain_on_failure_s: float = _rule(120.0, least=0)


@dataclass(frozen=True, kw_only=True)
class AutoExportConfig:
    """The whole node; `output_dir` is absolute."""

    enabled: bool = True
    output_dir: Path = field(metadata={"convert": _directory})
    source: str = _rule("auto", one_of=("auto", "live", "checkpoint"))
    role: str = _rule("actor", one_of=("actor", "critic"))
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    on_error: str = _rule("warn", one_of=("warn", "raise"))
    chain_callback: str | None = _rule(None, convert=_class_path)


def load_config(node: DictConfig | Mapping[str, Any]) -> AutoExportConfig:
    """Check the node `autoexport` and return it with types, defaults and absolute paths.

    Raises ConfigError naming the key, the value, what was expected and what to do.
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
    """`node` without interpolations; what is no mapping is left to `_read` to refuse."""
    if not isinstance(node, Mapping):
        return node
    try:
        node = node if isinstance(node, DictConfig) else OmegaConf.create(dict(node))
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        key = f"{ROOT}.{(e.full_key or '').removeprefix(f'{ROOT}.')}"
        raise ConfigError(f"{key} has no value: {str(e).splitlines()[0]}. Set it.") from e


def config_dir() -> Path:
    """The directory with `autoexport/default.yaml`: in the package (wheel) or beside it (source checkout)."""
    package = Path(__file__).resolve().parents[1]
    for parent in (package, package.parent):
        if (parent / "configs" / ROOT / "default.yaml").is_file():
            return parent / "configs"
    raise ConfigError(f"{package}/configs/{ROOT}/default.yaml is missing: reinstall verl_autoexport.")


def _read(cls: type, data: Any, key: str) -> Any:
    """An instance of the dataclass `cls` from the mapping `data` found at `key`."""
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(data, Mapping):
        raise _refused(key, data, f"a mapping (keys: {', '.join(fields)})")
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
    if dataclasses.is_dataclass(hint):
        return _read(hint, value, key)
    item = (*get_args(hint), None)[0]
    if dataclasses.is_dataclass(item):
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


def _typed(cls: type, name: str, hint: Any, value: Any, key: str) -> Any:
    """`value` as the field's type; OmegaConf converts, but for two liberties of its own."""
    kind = next((e for t, e in _EXPECTED if hint == t or t in get_args(hint)), str(hint))
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)  # frozen dataclasses come as read-only nodes
    try:
        if (hint is bool and not isinstance(value, bool | str)) or (hint is str and not isinstance(value, str)):
            raise ValueError  # OmegaConf would take 5 as true, and make "5" of 5
        schema[name] = value
        typed = schema[name]
    except (OmegaConfBaseException, ValueError) as e:
        raise _refused(key, value, kind) from e
    if isinstance(typed, ListConfig):
        return tuple(sorted(set(typed)))
    if isinstance(typed, float) and not math.isfinite(typed):
        raise _refused(key, value, "a finite number")
    if typed == "":
        raise _refused(key, value, kind)
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
        raise _refused(key, value, f"one of {' | '.join(v if isinstance(v, str) else _show(v) for v in one_of)}")
    if least is not None and value < least:
        raise _refused(key, value, f"{least} or more")
    if above is not None and value <= above:
        raise _refused(key, value, f"more than {above}")


def _check_best(best: Iterable[BestConfig]) -> None:
    seen: set[str] = set()
    for b in best:
        key = f"{ROOT}.trigger.best.name"
        if not _NAME.fullmatch(b.name) or b.name.strip(".") == "":
            raise _refused(key, b.name, "at most 100 letters, digits, '_', '.' and '-'", "It becomes a file name.")
        if b.name in seen:
            raise _refused(key, b.name, "a different name for each entry", "Two have this one.")
        seen.add(b.name)


def _check_threshold(threshold: Iterable[ThresholdConfig]) -> None:
    seen: set[str] = set()
    for t in threshold:
        if (t.above is None) == (t.below is None):
            found = f"above={_show(t.above)} and below={_show(t.below)}"
            raise ConfigError(f"{ROOT}.trigger.threshold ({t.metric}): expected one of above, below; found {found}.")
        if t.name in seen:
            raise _refused(f"{ROOT}.trigger.threshold", t.name, "each threshold once", "Two are the same.")
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
            if dataclasses.is_dataclass(part):
                yield from _all_keys(part, f"{key}.{name}")


def _refused(key: str, value: Any, expected: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{key}: expected {expected}, found {_show(value)}.{hint and f' {hint}'}")


def _show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)  # as in YAML: null, true, false

"""Every option as a field of a frozen dataclass, with its default and its rule; it is spelled nowhere else.

The `autoexport` node of a run is read into `AutoExportConfig`, what is said on the command line or to
`export_checkpoint` into `ExportOptions`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

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
        raise refused(key, value, "a size such as 5GB or 512MiB", f"Units: {_UNIT_NAMES}; none means bytes.")
    return size


def _directory(value: Any, key: str) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise refused(key, value, "the path of a directory")
    if _URL.match(str(value)):
        raise refused(key, value, "a directory that this node can reach", "URLs are not: upload afterwards.")
    return Path(os.path.abspath(os.path.expanduser(value)))


def _class_path(value: Any, key: str) -> str:
    if not isinstance(value, str) or not _CLASS.fullmatch(value):
        raise refused(key, value, "a class as package.module.Class")
    if value.startswith("verl_autoexport."):
        raise refused(key, value, "your own callback", "This package's is called anyway.")
    return value


def _placement(value: Any, key: str) -> dict[str, dict[str, Any]]:
    """`resources`: name → amount, `labels`: name → value, both of Ray."""
    expected = "{resources: {name: amount}} and/or {labels: {name: value}} of Ray nodes"
    if not isinstance(value, Mapping) or not value or not value.keys() <= {"resources", "labels"}:
        raise refused(key, value, expected)
    for kind, types in (("resources", (int, float)), ("labels", (str,))):
        entries = value.get(kind) or {}
        if not isinstance(entries, Mapping):
            raise refused(f"{key}.{kind}", entries, expected)
        for name, entry in entries.items():
            if not isinstance(name, str) or isinstance(entry, bool) or not isinstance(entry, types):
                raise refused(f"{key}.{kind}.{name}", entry, expected)
            if name in ("CPU", "GPU", "memory") or (kind == "resources" and entry <= 0):
                raise refused(f"{key}.{kind}.{name}", entry, "a resource of your own, and more than 0 of it")
    return {kind: dict(value.get(kind) or {}) for kind in ("resources", "labels")}


def _rule(
    default: Any,
    *,
    one_of: tuple[Any, ...] = (),
    least: float | None = None,
    above: float | None = None,
    convert: Callable[[Any, str], Any] | None = None,
    help: str = "",
    metavar: str | None = None,
) -> Any:
    """A field with its rule: an enumeration, a bound, or a reader of its own.

    One with a `help` is an option of the command line too, where `metavar` stands for its value.
    """
    rule = {"one_of": one_of, "least": least, "above": above, "convert": convert, "help": help, "metavar": metavar}
    return field(default=default, metadata=rule)


def _size(default: str | None, help: str = "", metavar: str | None = None) -> Any:
    return _rule(default and parse_size(default, "default"), convert=parse_size, help=help, metavar=metavar)


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

    dtype: str = _rule(
        "bfloat16",
        one_of=("bfloat16", "float16", "float32", "base", "source"),
        help="`source`: as in training; `base`: tensor for tensor as in the base model",
    )
    max_shard_size: int = _size("5GB", help="split larger models (default 5GB)", metavar="S")
    lora: str = _rule("fused", one_of=("fused", "adapter", "both"), help="how a LoRA checkpoint is exported")
    base_check: str = _rule(
        "strict",
        one_of=("strict", "warn", "off"),
        help="differences from the base model are refused, noted, or not looked for",
    )
    carry_unread: bool = _rule(False, help="copy the base's tensors that training never read (MTP layers)")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Checks before publication; `auto` is skipped above `max_memory` bytes."""

    load: bool | str = _rule("auto", one_of=(True, False, "auto"))
    generate: bool | str = _rule("auto", one_of=(True, False, "auto"))
    max_memory: int = _size("16GiB")
    timeout_s: float = _rule(600.0, least=0)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(WeightsConfig):
    """How one export is made, by a run or by hand. Sizes are in bytes.

    `lora_config`: the `adapter_config.json` that a LoRA run began with, or its directory. `external_lib`:
    modules to import before the model is built, separated by commas.
    """

    base_model: str | None = _rule(
        None, help="the model that was trained; compared, and read if only LoRA was saved", metavar="DIR"
    )
    lora_config: Path | None = field(
        default=None,
        metadata={"help": "adapter_config.json of the adapter that training began with", "metavar": "FILE"},
    )
    memory_budget: int = _size("1GiB", help="bytes of buffers per worker", metavar="B")
    trust_remote_code: bool = _rule(False, help="let the model's own code run")
    external_lib: str | None = None
    verify: VerifyConfig = field(default_factory=VerifyConfig)


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


def refused(key: str, value: Any, expected: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{key}: expected {expected}, found {show(value)}.{hint and f' {hint}'}")


def show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)  # as in YAML: null, true, false

"""Every option as a field of a frozen dataclass, with its default and its rule; the only place that defines options.

The `autoexport` node of a run is read into `AutoExportConfig`; the command line's options and the arguments
of `export_checkpoint` are read into `ExportOptions`.
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
_VALIDATION = ("val-", "val/")
_METRIC = "the metric: its name, or a glob that matches exactly one logged name"


def is_val(metric: str) -> bool:
    """Whether a metric (`val-…` in PPO, `val/…` in SFT) comes from validation, and so measures its step's weights."""
    return metric.startswith(_VALIDATION)


def may_be_val(metric: str) -> bool:
    """Whether a metric's name or glob can match a metric from validation."""
    literal = re.split(r"[*?[]", metric)[0]
    return is_val(metric) or (literal != metric and any(prefix.startswith(literal) for prefix in _VALIDATION))


def parse_size(value: Any, key: str) -> int:
    """Bytes in `value`: an int, or a string such as `5GB`, `1.5 TB`, `512MiB`. The error names `key`."""
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
    """The placement of Ray tasks: `resources`: name → amount, `labels`: name → value."""
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
            if name in ("CPU", "GPU", "memory") or (not isinstance(entry, str) and entry <= 0):
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
    """A field with its rule: an enumeration, a bound, or a custom reader.

    `help` describes it in `docs/configuration.md`. A field of `ExportOptions` with `help` is also an option of
    the command line, where `metavar` stands for its value.
    """
    rule = {"one_of": one_of, "least": least, "above": above, "convert": convert, "help": help, "metavar": metavar}
    return field(default=default, metadata=rule)


def _size(default: str | None, help: str = "", metavar: str | None = None) -> Any:
    return _rule(default and parse_size(default, "default"), convert=parse_size, help=help, metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """A milestone whenever `metric` beats every earlier value by more than `min_delta`."""

    metric: str = field(metadata={"help": _METRIC})
    mode: str = _rule("max", one_of=("max", "min"), help="whether a higher or a lower value is better")
    min_delta: float = _rule(0.0, least=0, help="a value must be better than the best one by more than this")
    name: str = _rule("best", help="the pointer: `best` for this name, `best-NAME` for any other")


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """A milestone when `metric` is above (or below) a value; only the first time if `once`."""

    metric: str = field(metadata={"help": _METRIC})
    above: float | None = _rule(None, help="fires when the value is above this; give either `above` or `below`")
    below: float | None = _rule(None, help="fires when the value is below this")
    once: bool = _rule(True, help="`false`: fires every time, not only the first time")

    @property
    def name(self) -> str:
        sign, value = ("<", self.below) if self.above is None else (">", self.above)
        return f"{self.metric}{sign}{value:.12g}"


@dataclass(frozen=True, kw_only=True)
class TriggerConfig:
    """The rules by which steps become milestones."""

    every_n_steps: int | None = _rule(None, least=1, help="the first possible step in each interval of N steps")
    at_steps: tuple[int, ...] = _rule((), least=1, help="exactly these steps")
    every_seconds: float | None = _rule(
        None, above=0, help="the first possible step at least this long after the last one"
    )
    on_save: bool = _rule(False, help="every step at which verl saves a checkpoint")
    on_train_end: bool = _rule(True, help="the last step of a training that succeeded")
    on_request: bool = _rule(True, help="the next possible step after `verl-autoexport request`")
    best: tuple[BestConfig, ...] = _rule(
        (), help="a step whose metric is better than ever; one entry, or a list of them"
    )
    threshold: tuple[ThresholdConfig, ...] = _rule(
        (), help="a step whose metric passes a value; one entry, or a list of them"
    )
    min_steps_between: int = _rule(
        0,
        least=0,
        help="holds back `every_n_steps`, `every_seconds` and `on_save` until this many steps after the last milestone",
    )

    @property
    def metrics(self) -> tuple[tuple[str, str], ...]:
        """The key and the pattern of every metric that a trigger uses."""
        entries = [("best", b.metric) for b in self.best] + [("threshold", t.metric) for t in self.threshold]
        return tuple((f"{ROOT}.trigger.{kind}.metric", metric) for kind, metric in entries)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The content of the exported files. Each of these keys is also an option of `verl-autoexport export`."""

    dtype: str = _rule(
        "bfloat16",
        one_of=("bfloat16", "float16", "float32", "base", "source"),
        help="`source`: as in training; `base`: tensor for tensor as in the base model",
    )
    max_shard_size: int = _size("5GB", help="split larger models into several files (default 5GB)", metavar="S")
    lora: str = _rule(
        "fused",
        one_of=("fused", "adapter", "both"),
        help="how a LoRA run is exported: the fused model, the adapter, or the model with the adapter in `adapter/`",
    )
    base_check: str = _rule(
        "strict",
        one_of=("strict", "warn", "off"),
        help="unexplained differences from the base model are refused, noted, or not looked for",
    )
    carry_unread: bool = _rule(False, help="copy the base's tensors that training never read (MTP layers)")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Checks before publication."""

    load: bool | str = _rule(
        "auto",
        one_of=(True, False, "auto"),
        help="load the version in a fresh process on the CPU; `auto` skips this above `max_memory`, or if too little "
        "memory is free; `false` also skips `generate`",
    )
    generate: bool | str = _rule(
        "auto",
        one_of=(True, False, "auto"),
        help="after loading, generate a few tokens and compare tensors and logits with the shards; `true` acts as "
        "`auto`",
    )
    max_memory: int = _size("16GiB", help="memory that loading may need with `load: auto`")
    timeout_s: float = _rule(
        600.0, least=0, help="loading and generating are skipped after this long, and the version is published"
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions(WeightsConfig):
    """The options of one export, by a run or by hand. Sizes are in bytes.

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
    external_lib: str | None = None  # only from a run's configuration: without `help` it is no option
    verify: VerifyConfig = field(default_factory=VerifyConfig)


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """The rules by which versions stay: a version stays if any key keeps it, and without keys all stay."""

    last: int | None = _rule(None, least=1, help="the N highest steps")
    best: int | None = _rule(None, least=1, help="the N best by the metric of each `trigger.best`")
    every_n_steps: int | None = _rule(
        None, least=1, help="the first version at or after each multiple of N, permanently"
    )
    max_bytes: int | None = _size(None, help="limit on all versions together; the least valuable are removed first")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Resources of the merge."""

    workers: int | None = _rule(None, least=1, help="files merged at a time; `null`: 4")
    num_cpus: float = _rule(1.0, above=0, help="Ray CPUs that a merge task asks for")
    memory_budget: int = _size(
        "1GiB",
        help="buffers of one merge task, packed experts included; only a matrix into which LoRA is fused is held whole",
    )
    schedule_timeout_s: float = _rule(
        30.0,
        least=0,
        help="a task that Ray has not started after this long asks for less: first no CPU, then no `placement`",
    )
    placement: dict[str, Any] | None = field(
        default=None,
        metadata={
            "convert": _placement,
            "help": "Ray nodes to merge on: `{resources: {name: amount}}` and/or `{labels: {name: value}}`",
        },
    )


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """The behaviour when milestones come faster than exports, and the limits of all waits."""

    overflow: str = _rule(
        "coalesce",
        one_of=("coalesce", "wait", "skip"),
        help="when there is no room: a later step takes the place of an earlier one, training waits, or the newest "
        "milestone is dropped",
    )
    wait_timeout_s: float = _rule(600.0, least=0, help="longest time that training waits for room")
    inflight_bytes: int | None = _size(
        None, help="live source: most bytes of snapshots in Ray's object store; `null`: 30 % of it"
    )
    device_clone: bool = _rule(
        False, help="live source: copy on the GPU first, which shortens the stall and takes GPU memory for a moment"
    )
    stall_timeout_s: float = _rule(
        60.0, above=0, help="longest time that a file system that does not answer holds training at a step"
    )
    stage_timeout_s: float = _rule(
        1800.0,
        above=0,
        help="an export fails when one of its stages shows no progress for this long; verification has "
        "`verify.timeout_s` on top",
    )
    drain_timeout_s: float = _rule(3600.0, least=0, help="longest wait for open exports after training")
    drain_on_failure_s: float = _rule(120.0, least=0, help="the same after a training that failed")


@dataclass(frozen=True, kw_only=True)
class AutoExportConfig:
    """The whole node `autoexport`; `output_dir` is absolute."""

    enabled: bool = _rule(True, help="`false` turns exports off without removing the flag")
    output_dir: Path = field(
        metadata={
            "convert": _directory,
            "help": "where versions are published: a directory that verl's TaskRunner can write to, no URL",
        }
    )
    source: str = _rule(
        "auto",
        one_of=("auto", "live", "checkpoint"),
        help="where weights come from: the running workers, verl's checkpoints, or with `auto` a checkpoint at a step "
        "that verl saves and the workers at any other",
    )
    role: str = _rule("actor", one_of=("actor", "critic"), help="whose weights are exported")
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    on_error: str = _rule(
        "warn", one_of=("warn", "raise"), help="`warn`: a failed export is logged; `raise`: it stops training"
    )
    chain_callback: str | None = _rule(
        None,
        convert=_class_path,
        help="your own `CheckpointCallback` as `package.module.Class`, called after each save",
    )
    hook: bool = _rule(True, help="set by the config group; it stops a run whose driver lacks this package's hook")


def refused(key: str, value: Any, expected: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{key}: expected {expected}, found {show(value)}.{hint and f' {hint}'}")


def show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)  # as in YAML: null, true, false

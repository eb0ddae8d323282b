"""Plain data that travels between the rooms; standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DROPPABLE_POLICIES = frozenset({"every_n_steps", "every_seconds", "on_save"})
"""Policies whose milestones back pressure or `min_steps_between` may drop; no other ever is."""

THESE_WEIGHTS = "these weights"
EARLIER_WEIGHTS = "earlier weights"


@dataclass(frozen=True)
class StepEvent:
    """What is known of a step when verl logs it.

    `time` is in unix seconds. `saved`: verl wrote a checkpoint of this step (the checkpoint
    source judges no others). `requested`: someone asked for a milestone.
    `last`: training succeeded and this was its final step.
    """

    step: int
    metrics: Mapping[str, float]
    time: float
    saved: bool = True
    requested: bool = False
    last: bool = False


@dataclass(frozen=True)
class Trigger:
    """One reason why a step became a milestone.

    `name`, `metric`, `value`, `mode` are set by the metric policies (`best`, `threshold`):
    `name` tells two policies of a kind apart, `mode` is `max`/`min` or `above`/`below`.
    """

    policy: str
    reason: str
    name: str | None = None
    metric: str | None = None
    value: float | None = None
    mode: str | None = None

    @property
    def droppable(self) -> bool:
        return self.policy in DROPPABLE_POLICIES

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trigger:
        """The trigger in `data`, which anybody may have written: what is of a wrong type is left out."""
        texts = {f.name: data.get(f.name) for f in dataclasses.fields(cls) if f.name != "value"}
        texts = {key: text if isinstance(text, str) else None for key, text in texts.items()}
        value = data.get("value")
        return cls(**texts, value=value if is_measured(value) else None)


@dataclass(frozen=True)
class Milestone:
    """A step that was, is being, or was to be exported: the memory of the policies.

    `status`: `pending` (asked, not finished), `published`, `failed` or `dropped` (by back
    pressure). `time` is the unix time of the decision.
    """

    step: int
    time: float
    triggers: tuple[Trigger, ...]
    status: str = "pending"


@dataclass(frozen=True)
class Decision:
    """Step `step` is a milestone, for all of `triggers` (never empty)."""

    step: int
    time: float
    triggers: tuple[Trigger, ...]

    @property
    def droppable(self) -> bool:
        return all(t.droppable for t in self.triggers)


@dataclass(frozen=True)
class ExportRecord:
    """What `export.json` holds; field by field the contract of a published version.

    `timings_s` are seconds per stage, `files` lists name, bytes and sha256 of every file
    but `export.json` itself, `verification` maps each check to its status and detail.
    `version` is 0 for an export outside a registry.
    """

    version: int
    step: int
    created_at: str
    run: Mapping[str, Any]
    triggers: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, float | None]
    measured_on: str | None
    source: Mapping[str, Any]
    base_model: str | None
    architectures: tuple[str, ...]
    dtype: str
    num_parameters: int
    files: tuple[Mapping[str, Any], ...]
    verification: Mapping[str, Mapping[str, Any]]
    timings_s: Mapping[str, float]
    versions: Mapping[str, str | None]
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExportRecord:
        """Raises KeyError or TypeError where a required field is missing, or it or what it holds is of a wrong type."""
        _check_types(data)
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for key in ("triggers", "architectures", "files", "notes"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "schema_version": int, "version": int, "step": int, "created_at": str, "run": Mapping, "triggers": (list, tuple),
    "metrics": Mapping, "source": Mapping, "architectures": (list, tuple), "dtype": str, "num_parameters": int,
    "files": (list, tuple), "verification": Mapping, "timings_s": Mapping, "versions": Mapping,
}  # fmt: skip


def _check_types(data: Mapping[str, Any]) -> None:
    for key, kind in _FIELD_TYPES.items():
        if not isinstance(data[key], kind) or (kind is int and isinstance(data[key], bool)):
            raise TypeError(f"{key}: expected {kind}, found {type(data[key]).__name__}")
    for key, (expected, holds) in _INNER.items():
        found = data.get(key) or ()
        items = found.values() if isinstance(found, Mapping) else found
        if not all(map(holds, items)):
            wrong = next(item for item in items if not holds(item))
            raise TypeError(f"{key}: expected {expected}, found {wrong!r:.80}")
    for key, value in (("source", data["source"].get("fingerprint")), *((k, data.get(k)) for k in _TEXTS)):
        if not isinstance(value, str | None):
            raise TypeError(f"{key}: expected a text or null, found {value!r:.80}")


def as_number(value: Any) -> float | None:
    """A metric as a float; None for what is no number, whatever it raises when it is asked."""
    try:
        if isinstance(value, (str, bytes, bytearray, bool, complex)) or type(value).__name__ in ("bool", "bool_"):
            return None
        return float(value)
    except BaseException:  # noqa: BLE001 - a foreign object; only main threads are interrupted, and this is none
        return None


def is_measured(value: Any) -> bool:
    """Whether it is a finite number."""
    if type(value) is float:
        return math.isfinite(value)
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_trigger(value: Any) -> bool:
    """Whether `Trigger.from_dict` can take it as somebody wrote it."""
    # The value is judged where it is compared.
    texts = ("reason", "name", "metric", "mode")
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("policy"), str)
        and all(isinstance(value.get(key), str | None) for key in texts)
        and isinstance(value.get("value"), int | float | str | None)
    )


def _is_file(value: Any) -> bool:
    size = value.get("bytes", 0) if isinstance(value, Mapping) else None
    whole = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63
    return whole and all(isinstance(value.get(key, ""), str) for key in ("name", "sha256"))


def _is_check(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("status"), str):
        return False
    lists = (value.get("transposed", ()), value.get("carried", ()))
    return all(isinstance(names, (list, tuple)) and all(map(_is_text, names)) for names in lists)


_TEXTS = ("measured_on", "base_model")
_INNER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "triggers": ("objects with a policy", is_trigger),
    "metrics": ("finite numbers or null", lambda value: value is None or is_measured(value)),
    "architectures": ("texts", _is_text),
    "files": ("objects with name, bytes and sha256", _is_file),
    "verification": ("objects with a status", _is_check),
    "timings_s": ("finite numbers", is_measured),
    "versions": ("texts or null", lambda value: isinstance(value, str | None)),
    "notes": ("texts", _is_text),
}

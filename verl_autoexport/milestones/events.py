"""Plain data that travels between the rooms; it needs the standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

DROPPABLE_POLICIES = frozenset({"every_n_steps", "every_seconds", "on_save"})
"""Policies whose milestones back pressure or `min_steps_between` may drop; other milestones are never dropped."""

THESE_WEIGHTS = "these weights"
EARLIER_WEIGHTS = "earlier weights"


@dataclass(frozen=True)
class StepEvent:
    """The facts about a step when verl logs it.

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
        """The trigger in untrusted `data`, without the fields that have a wrong type."""

        def text(key: str) -> str | None:
            found = data.get(key)
            return found if isinstance(found, str) else None

        value = data.get("value")
        number = value if is_measured(value) else None
        return cls(text("policy") or "", text("reason") or "", text("name"), text("metric"), number, text("mode"))


@dataclass(frozen=True)
class Milestone:
    """A step that was, is being, or was to be exported; the policies decide from these.

    `status`: `pending` (requested, not finished), `published`, `failed` or `dropped` (by back
    pressure). `time` is the unix time of the decision.
    """

    step: int
    time: float
    triggers: tuple[Trigger, ...]
    status: str = "pending"


@dataclass(frozen=True)
class Decision:
    """The decision that `step` is a milestone, for all of `triggers` (never empty)."""

    step: int
    time: float
    triggers: tuple[Trigger, ...]

    @property
    def droppable(self) -> bool:
        return all(t.droppable for t in self.triggers)


def as_number(value: Any) -> float | None:
    """A metric as a float; None if it is no number, whatever the conversion raises."""
    try:
        if isinstance(value, (str, bytes, bytearray, bool, complex)) or type(value).__name__ in ("bool", "bool_"):
            return None
        return float(value)
    except BaseException:  # noqa: BLE001 - a foreign object; only the main thread is interrupted, and this is another
        return None


def is_measured(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    if type(value) is float:
        return math.isfinite(value)
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def is_trigger(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether `Trigger.from_dict` can read the untrusted `value`."""
    # The comparison judges the trigger's value.
    texts = ("reason", "name", "metric", "mode")
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("policy"), str)
        and all(isinstance(value.get(key), str | None) for key in texts)
        and isinstance(value.get("value"), int | float | str | None)
    )

"""The metrics that verl logs, as names and numbers; a metric that is no number is left out and disturbs no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_autoexport.config.schema import TriggerConfig, is_val, may_be_val
from verl_autoexport.milestones.events import as_number
from verl_autoexport.milestones.triggers import check_metrics


def numbers(data: Mapping[Any, Any]) -> dict[str, float]:
    """The metrics that are numbers, as floats (verl mixes float, np.float64, int and np.int32)."""
    found = {}
    for key, value in data.items():
        name, number = _name(key), as_number(value)
        if name is not None and number is not None:
            found[name] = number
    return found


def check_logged(trigger: TriggerConfig, data: Mapping[Any, Any], trained: bool) -> bool:
    """Whether `data` should have all metrics of `trigger`; raises ConfigError if it should and does not.

    The first validation should have validation metrics, the first trained step all others.
    """
    logged = [name for key in data if (name := _name(key)) is not None]
    validation = any(map(is_val, logged))
    val = [may_be_val(metric) for _, metric in trigger.metrics]
    ready = validation if all(val) else trained and (validation or not any(val))
    if ready:
        check_metrics(trigger, logged)
    return ready


def _name(key: Any) -> str | None:
    try:
        return "".join(str(key))  # a plain string, whose hash is its own
    except BaseException:  # noqa: BLE001 - a foreign object
        return None

"""What verl logs, as names and numbers: an odd metric loses itself and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from verl_autoexport.events import as_number


def numbers(data: Mapping[Any, Any]) -> dict[str, float]:
    """The metrics that are numbers, as floats (verl mixes float, np.float64, int and np.int32)."""
    found = {}
    for key, value in data.items():
        name, number = _name(key), as_number(value)
        if name is not None and number is not None:
            found[name] = number
    return found


def names(data: Iterable[Any]) -> list[str]:
    """The names of all metrics, numbers or not."""
    return [name for key in data if (name := _name(key)) is not None]


def _name(key: Any) -> str | None:
    try:
        return str(key)
    except BaseException:  # noqa: BLE001 - a foreign object
        return None

"""Other packages' implementations of a seam, found by entry points, so that every process of a run has them."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from verl_autoexport.errors import ConfigError


def load(group: str) -> list[Any]:
    """An instance of each class that an installed package names in `group`, by name.

    Raises ConfigError naming a class that cannot be instantiated.
    """
    made = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            made.append(point.load()())
        except Exception as e:
            raise ConfigError(
                f"entry point {point.name} = {point.value} of {group} cannot be used: {type(e).__name__}: {e}. "
                "Repair or uninstall the package that adds it."
            ) from e
    return made

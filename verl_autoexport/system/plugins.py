"""Other packages' implementations of a seam, found by entry points, so that every process of a run has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from verl_autoexport.errors import ConfigError


def load(group: str) -> list[Any]:
    """An instance of each class that an installed package names in `group`, by name.

    Raises ConfigError naming a class that cannot be instantiated.
    """
    made = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        with _named(point):
            made.append(point.load()())
    return made


def find(group: str, name: str) -> Any | None:
    """The class that an installed package names `name` in `group`; None if there is none.

    Raises ConfigError if it cannot be imported, or if there are several.
    """
    points = entry_points(group=group, name=name)
    if len(points) > 1:
        raise ConfigError(
            f"entry points of {group}: {name} is {' and '.join(sorted(p.value for p in points))}: expected one. "
            "Uninstall the packages that add the others."
        )
    for point in points:
        with _named(point):
            return point.load()
    return None


@contextmanager
def _named(point: EntryPoint) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        raise ConfigError(
            f"entry point {point.name} = {point.value} of {point.group} cannot be used: {type(e).__name__}: {e}. "
            "Repair or uninstall the package that adds it."
        ) from e

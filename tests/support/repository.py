"""Where this checkout is, and the environment of processes that import from it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "verl_autoexport"
SUPPORT = ROOT / "tests/support"
DATA = ROOT / "tests/data"


def import_path() -> dict[str, str]:
    """`PYTHONPATH` with this checkout first: verl's wheel brings a package `tests` of its own."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports `tests` and the package from this checkout."""
    return {**os.environ, **import_path(), **variables}

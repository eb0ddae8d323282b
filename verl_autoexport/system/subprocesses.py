"""Child processes: the same Python with the same packages, but nothing from the working directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_RUN = (
    "import sys; sys.path = [p for p in sys.path if p]; import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)  # `-m` would import from the working directory, which may be a checkpoint

_PACKAGES = str(Path(__file__).resolve().parents[2])


def command(module: str, *args: str) -> list[str]:
    """The command that runs `module`; use it with `environment`."""
    return [sys.executable, "-c", _RUN, module, *args]


def environment() -> dict[str, str]:
    """The environment of this process, with its search path and this package; names and files are UTF-8."""
    path = [os.path.abspath(p) for p in sys.path if isinstance(p, str) and p] + [_PACKAGES]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUTF8": "1"}

"""The library that makes system calls fail, for LD_PRELOAD."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import SUPPORT


def build(folder: Path) -> Path:
    """Compiles `faults.c` into `folder`; skips the test where there is no compiler."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler here")
    library = folder / "faults.so"
    command = [compiler, "-w", "-O1", "-shared", "-fPIC", SUPPORT / "faults.c", "-o", library, "-ldl"]
    subprocess.run(command, check=True)
    return library

"""verl's releases as wheels, which are parsed and not installed."""

from __future__ import annotations

import ast
import zipfile
from functools import cache
from typing import Any

from tests.support.repository import ROOT

WHEELS = {path.name.split("-")[1]: path for path in sorted((ROOT / ".wheels").glob("verl-*.whl"))}
VERSIONS = ("0.5.0", "0.6.0", "0.6.1", "0.7.0", "0.7.1", "0.8.0", "0.9.0", "0.9.1")


@cache
def sources(version: str) -> dict[str, str]:
    """{module: source} of a wheel."""
    assert version in WHEELS, f"verl {version}: its wheel is not in .wheels: run `make wheels`"
    with zipfile.ZipFile(WHEELS[version]) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("verl/") and n.endswith(".py")]
        return {n.removesuffix(".py").replace("/", "."): wheel.read(n).decode() for n in names}


def find(node: Any, *path: str) -> Any:
    """The class or function of these names, one in the other."""
    for name in path:
        node = next((n for n in node.body if getattr(n, "name", None) == name), None)
        assert node is not None, f"{'.'.join(path)} is gone"
    return node


def lines(node: ast.AST, *names: str) -> list[int]:
    """The lines of the calls of any of `names`, such as `self.logger.log`."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) in names]
    return sorted(n.lineno for n in calls)

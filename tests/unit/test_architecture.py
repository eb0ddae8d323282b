"""Which room of the package may import which, and how large its modules may grow."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import ROOT
from tests.support.rooms import PACKAGE, ROOMS

PLUGIN = ROOT / "hydra_plugins" / "autoexport_searchpath" / "__init__.py"
MAX_MODULE = 420  # lines
MAX_FUNCTION = 40  # lines, docstring not counted


# library -> the modules that may import it: a path below the package, a folder with its slash.
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "verl": ("trainers/", "sources/live/copier.py"),
    "ray": ("sources/live/", "sources/nodes/", "merge/ray_runner.py", "service/", "trainers/", "cli/connect.py"),
    "transformers": ("model/", "export/assets.py", "verify/"),
    "torch": ("sources/", "merge/", "model/", "verify/"),
    "hydra": ("trainers/startup_guard.py", "hydra_plugins/"),
    "omegaconf": ("config/", "trainers/"),
    "filelock": ("registry/",),
    "psutil": ("verify/checks.py", "merge/writer.py"),
    "numpy": ("sources/nodes/agent.py",),  # whose arrays Ray hands out without a copy
}  # fmt: skip
LIBRARIES_LAZY: Mapping[str, tuple[str, ...]] = {
    "tqdm": ("cli/terminal.py",), "huggingface_hub": ("model/base_model.py", "merge/plan.py"),
    "peft": ("verify/",), "safetensors": ("verify/", "sources/hf_model/"),
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """`name` is dotted and absolute; `lazy`: inside a function."""

    file: str
    line: int
    name: str
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Path below the package, with slashes -> file; the Hydra plug-in under `hydra_plugins/`."""
    found = {p.relative_to(root / PACKAGE).as_posix(): p for p in sorted((root / PACKAGE).rglob("*.py"))}
    plugins = root / "hydra_plugins"
    return found | {f"hydra_plugins/{p.relative_to(plugins).as_posix()}": p for p in plugins.rglob("*.py")}


def imports(file: str, path: Path) -> Iterator[Import]:
    """Every import of a module, those for type checkers and those in functions included."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the absolute name"
            yield from (Import(file, node.lineno, f"{node.module}.{alias.name}", lazy) for alias in node.names)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def target_room(name: str) -> str:
    """The room that `verl_autoexport.x.y` is in; a name that is no room is the package's own (`__version__`)."""
    part = f"{name}.".split(".")[1]
    return part if part in ROOMS else "__init__"


def within(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def wrong_rooms(root: Path = ROOT) -> list[str]:
    found = []
    for file, path in modules(root).items():
        here = room(file)
        for used in imports(file, path):
            if used.top != PACKAGE or (there := target_room(used.name)) == here:
                continue
            if there not in ROOMS[here]:
                found.append(f"{used}: {here} may import {', '.join(sorted(ROOMS[here])) or 'no other room'}")
    return found


def wrong_libraries(root: Path = ROOT) -> list[str]:
    found = []
    for file, path in modules(root).items():
        for used in imports(file, path):
            if used.top in sys.stdlib_module_names or used.top in (PACKAGE, "__future__"):
                continue
            places = LIBRARIES.get(used.top, ()) + (LIBRARIES_LAZY.get(used.top, ()) if used.lazy else ())
            if not within(file, places):
                found.append(f"{used}: {used.top} belongs in {', '.join(places) or 'no module; add it to the table'}")
    return found


def too_large(root: Path = ROOT) -> list[str]:
    found = []
    for file, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_MODULE:
            found.append(f"{file}: {lines} lines, at most {MAX_MODULE}; split it")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (n := code_lines(node)) > MAX_FUNCTION:
                found.append(f"{file}:{node.lineno} {node.name}: {n} lines, at most {MAX_FUNCTION}; split it")
    return found


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of signature and body, functions inside it included, docstring not."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_every_room_has_a_rule() -> None:
    unknown = {room(file) for file in modules()} - ROOMS.keys()
    assert not unknown, f"{sorted(unknown)}: not in the table ROOMS; say there what it may import"


def test_imports_go_one_way() -> None:
    assert not (wrong := wrong_rooms()), "\n".join(wrong)


def test_rooms_have_no_circles() -> None:
    """The table itself is a partial order."""
    left = {name: set(allowed) - {"__init__"} for name, allowed in ROOMS.items()}
    while free := {name for name, allowed in left.items() if not allowed}:
        left = {name: allowed - free for name, allowed in left.items() if name not in free}
    assert not left, f"these import each other in a circle: {left}"


def test_libraries_stay_in_their_rooms() -> None:
    assert not (wrong := wrong_libraries()), "\n".join(wrong)


def test_modules_and_functions_stay_small() -> None:
    assert not (large := too_large()), "\n".join(large)


def test_tests_take_what_they_share_from_support() -> None:
    """A test module that another one imports could be neither moved nor split."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        allowed = ("tests.support.", "tests.benchmarks.") if "/benchmarks/" in file else ("tests.support.",)
        wrong += [str(i) for i in imports(file, path) if i.top == "tests" and not i.name.startswith(allowed)]
        attributes = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute))
        wrong += [f"{file}:{n.lineno}: sys.path; import `tests.…`" for n in attributes if ast.unparse(n) == "sys.path"]
    assert not wrong, "\n".join(wrong)

"""The house keeps its order: which room may import which, how large it may grow, what the wheel holds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "verl_autoexport"
PLUGIN = REPOSITORY / "hydra_plugins" / "autoexport_searchpath" / "__init__.py"
MAX_MODULE = 420  # lines
MAX_FUNCTION = 40  # lines, docstring not counted

# room -> the rooms that it may import besides itself; imports go up this list, never down.
ROOMS: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "system": frozenset({"errors", "__init__"}),
    "config": frozenset({"errors", "system"}),
    "milestones": frozenset({"errors", "system", "config"}),
    "shards": frozenset({"errors", "system"}),
    "sources": frozenset({"errors", "system", "shards"}),
    "registry": frozenset({"errors", "system", "milestones"}),
    "merge": frozenset({"errors", "system", "shards", "__init__"}),
    "model": frozenset({"errors", "system", "config", "shards", "sources", "merge"}),
    "verify": frozenset({"errors", "system", "shards", "sources", "registry", "merge", "model"}),
    "export": frozenset({
        "errors", "system", "config", "milestones", "shards", "sources", "registry", "merge", "model", "verify",
        "__init__",
    }),
    "publishers": frozenset({"errors", "system", "registry"}),
    "service": frozenset({
        "errors", "system", "config", "milestones", "shards", "sources", "registry", "merge", "model", "export",
        "publishers",
    }),
    "trainers": frozenset({"errors", "system", "config", "milestones", "sources", "registry", "model", "service"}),
    "cli": frozenset({
        "errors", "system", "config", "milestones", "shards", "sources", "registry", "merge", "export", "verify",
        "__init__",
    }),
    "__init__": frozenset(),  # its public names are resolved on first use
    "__main__": frozenset({"cli"}),
    "hydra_plugins": frozenset({"config"}),
}  # fmt: skip

# library -> the modules that may import it: a path below the package, a folder with its slash.
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "verl": ("trainers/", "sources/live/copier.py"),
    "ray": ("sources/live/", "sources/nodes/", "merge/ray_runner.py", "service/", "trainers/", "cli/connect.py"),
    "transformers": ("model/", "verify/"),
    "torch": ("sources/", "merge/", "model/", "verify/"),
    "hydra": ("trainers/startup_guard.py", "hydra_plugins/"),
    "omegaconf": ("config/", "trainers/"),
    "filelock": ("registry/",),
    "psutil": ("verify/checks.py", "merge/writer.py"),
    "numpy": ("sources/nodes/agent.py",),  # whose arrays Ray hands out without a copy
}  # fmt: skip
LIBRARIES_LAZY: Mapping[str, tuple[str, ...]] = {
    "tqdm": ("cli/terminal.py",), "huggingface_hub": ("model/base_model.py", "merge/plan.py"),
    "peft": ("verify/",), "safetensors": ("verify/",),
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


def modules(root: Path = REPOSITORY) -> dict[str, Path]:
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


def wrong_rooms(root: Path = REPOSITORY) -> list[str]:
    found = []
    for file, path in modules(root).items():
        here = room(file)
        for used in imports(file, path):
            if used.top != PACKAGE or (there := target_room(used.name)) == here:
                continue
            if there not in ROOMS[here]:
                found.append(f"{used}: {here} may import {', '.join(sorted(ROOMS[here])) or 'no other room'}")
    return found


def wrong_libraries(root: Path = REPOSITORY) -> list[str]:
    found = []
    for file, path in modules(root).items():
        for used in imports(file, path):
            if used.top in sys.stdlib_module_names or used.top in (PACKAGE, "__future__"):
                continue
            places = LIBRARIES.get(used.top, ()) + (LIBRARIES_LAZY.get(used.top, ()) if used.lazy else ())
            if not within(file, places):
                found.append(f"{used}: {used.top} belongs in {', '.join(places) or 'no module; add it to the table'}")
    return found


def too_large(root: Path = REPOSITORY) -> list[str]:
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


def test_importing_the_package_is_light() -> None:
    heavy = ["torch", "ray", "transformers", "verl", "omegaconf", "hydra"]
    code = f"import json, sys; import {PACKAGE}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # no plug-ins of other tests
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [], f"`import {PACKAGE}` must not load these"


# -- the wheel -----------------------------------------------------------------------------


def _pip(*args: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", str(REPOSITORY), "--no-deps", "--quiet", "-w", str(target))
    (found,) = target.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    _pip("install", "--no-deps", "--quiet", "--target", str(target), str(wheel))
    return target


def test_wheel_holds_the_config_group_and_nothing_beside_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{PACKAGE}/configs/autoexport/default.yaml", "hydra_plugins/autoexport_searchpath/__init__.py"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {PACKAGE, "hydra_plugins"}
    assert "hydra_plugins/__init__.py" not in names, "hydra_plugins is a namespace package that others share"


def test_wheel_installs_nothing_else_into_a_verl_environment(wheel: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    _pip("install", "--dry-run", "--quiet", "--report", str(report), str(wheel))
    would = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    # Nothing at all where this very version is installed already, as `pip install -e .` leaves it.
    assert would <= {PACKAGE, PACKAGE.replace("_", "-")}, f"would also install or change {sorted(would)}"


def _main_ppo(installed: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """verl's own command with the installed wheel, far from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "verl.trainer.main_ppo", f"hydra.run.dir={installed / 'run'}", *args]
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=300)


def test_flag_works_from_the_wheel(installed: Path) -> None:
    done = _main_ppo(installed, "+autoexport=default", "autoexport.trigger.every_n_steps=2", "--cfg", "all")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout[done.stdout.index("hydra:\n") :])
    sources = {s["provider"]: s["path"] for s in config["hydra"]["runtime"]["config_sources"]}
    assert sources[PACKAGE] == str(installed / PACKAGE / "configs"), "the group does not come from the wheel"
    assert config["hydra"]["callbacks"]["autoexport"]["_target_"] == f"{PACKAGE}.trainers.startup_guard.StartupGuard"
    assert config["trainer"]["checkpoint_callback_class"] == f"{PACKAGE}.AutoExportCallback"
    assert config["autoexport"]["trigger"]["every_n_steps"] == 2


def test_guard_of_the_wheel_stops_a_run_that_would_export_nothing(installed: Path) -> None:
    done = _main_ppo(installed, "+autoexport=default", "autoexport.source=checkpoint", "trainer.save_freq=-1")
    assert done.returncode == 1
    assert "verl_autoexport: trainer.save_freq=-1: " in done.stderr.splitlines()[-1], done.stderr

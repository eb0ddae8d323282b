"""What an installation brings, what it loads, and that verl's own command finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.support.repository import ROOT

PACKAGE = "verl_autoexport"

# -- what is loaded ---------------------------------------------------------------------------


def test_importing_the_package_is_light() -> None:
    heavy = ["torch", "ray", "transformers", "verl", "omegaconf", "hydra"]
    code = f"import json, sys; import {PACKAGE}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # no plug-ins of other tests
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [], f"`import {PACKAGE}` must not load these"


def test_reading_needs_no_heavy_package():
    heavy = {"torch", "ray", "omegaconf", "transformers", "verl"}
    code = f"import sys, verl_autoexport.registry.store; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_importing_stays_light():
    code = (
        "import sys, verl_autoexport.config.run_rules, verl_autoexport.milestones.triggers; "
        "import hydra_plugins.autoexport_searchpath; "
        "print([m for m in ('torch', 'ray', 'transformers', 'verl') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_a_broken_installation_of_ours_breaks_no_other_hydra_application():
    code = (
        "import sys; from hydra._internal.config_search_path_impl import ConfigSearchPathImpl; "
        "from hydra_plugins.autoexport_searchpath import AutoExportSearchPath; "
        "sys.modules['verl_autoexport'] = None; path = ConfigSearchPathImpl(); "
        "AutoExportSearchPath().manipulate_search_path(path); print(path.get_path())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


# -- the wheel ------------------------------------------------------------------------------


def _pip(*args: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", str(ROOT), "--no-deps", "--quiet", "-w", str(target))
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
    assert f"{PACKAGE}/py.typed" in names, "without it no type checker reads this package's types"
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
    assert config["trainer"]["checkpoint_callback_class"] is None, "it is the user's own"
    assert config["autoexport"]["trigger"]["every_n_steps"] == 2


def test_guard_of_the_wheel_stops_a_run_that_would_export_nothing(installed: Path) -> None:
    done = _main_ppo(installed, "+autoexport=default", "autoexport.source=checkpoint", "trainer.save_freq=-1")
    assert done.returncode == 1
    assert "verl_autoexport: trainer.save_freq=-1: " in done.stderr.splitlines()[-1], done.stderr

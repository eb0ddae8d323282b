"""A run without Ray: the controller, an exporter in this process or in one of its own, and real checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import environment
from verl_autoexport.config.reading import load_config
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.local_service import LocalExportService
from verl_autoexport.service.process_service import ProcessExportService
from verl_autoexport.service.request import RunInfo

PROGRAM = """
import json, sys
from pathlib import Path
from verl_autoexport.config.reading import load_config
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.local_service import LocalExportService
from verl_autoexport.service.request import RunInfo
root = Path(sys.argv[1])
node = {"output_dir": str(root / "exports"), "verify": {"load": False}, "trigger": {"on_save": True}}
run = RunController(load_config(node), RunInfo(root), LocalExportService)
run.begin(0, None)
run.saved(2, root / "global_step_2")
run.logged(2, {})
run.end(True)
print(run.drain(120))
print(json.dumps([m for m in ("ray", "verl") if m in sys.modules]))
"""
"""A run that saves one step and exports it."""


def start(root: Path, service=LocalExportService, **settings) -> RunController:
    node = {"output_dir": str(root / "exports"), "verify": {"load": False}} | settings
    run = RunController(load_config(node), RunInfo(root), service)
    run.begin(0, 4)
    return run


@pytest.mark.parametrize("service", [LocalExportService, ProcessExportService])
def test_milestones_of_a_run(checkpoint, tmp_path, caplog, service):
    run = start(tmp_path, service, trigger={"best": {"metric": "val/x"}, "on_train_end": True})
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.9), (4, 0.2)):
        run.saved(step, Path(shutil.copytree(checkpoint("even"), tmp_path / f"global_step_{step}")))
        shutil.rmtree(tmp_path / f"global_step_{step}")
        run.logged(step, {"val/x": value})
    run.end(True)
    assert "3 published (v0001-step1, v0002-step3, v0003-step4)" in run.drain(120)
    assert Registry(tmp_path / "exports").find("best").step == 3
    warned = [
        r.getMessage() for r in caplog.records if r.levelno > logging.INFO and r.name.startswith("verl_autoexport")
    ]
    assert warned == [], "a healthy run has nothing to warn of"


def test_a_lost_process_fails_its_export_and_the_next_request_starts_another(checkpoint, tmp_path):
    run = start(tmp_path, ProcessExportService, trigger={"on_save": True}, on_error="warn")
    for step in (1, 2):
        run.saved(step, Path(shutil.copytree(checkpoint("even"), tmp_path / f"global_step_{step}")))
        run.logged(step, {})
        if step == 1:
            run.service.child.process.kill()
            (lost,) = [p.future.result(timeout=60) for p in run.ledger.pending]
            assert lost.lost
            assert lost.reason == "the export process ended with exit code -9"
    run.end(True)
    report = run.drain(120)
    assert "1 published (v0001-step2)" in report
    assert "1 failed (step 1: the export process ended with exit code -9)" in report
    run.service.close()
    (hold,) = (tmp_path / ".autoexport").iterdir()
    assert "step_1" in hold.name, "the next start exports it"


def test_it_needs_no_ray(checkpoint, tmp_path):
    shutil.copytree(checkpoint("even"), tmp_path / "global_step_2")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    report, modules = done.stdout.splitlines()[-2:]
    assert "1 published (v0001-step2)" in report
    assert json.loads(modules) == []


def test_a_failed_export_is_an_outcome(checkpoint, tmp_path):
    made = Path(shutil.copytree(checkpoint("even"), tmp_path / "global_step_2"))
    (made / "actor/huggingface/config.json").write_text("{}")
    run = start(tmp_path, trigger={"at_steps": [2]})
    run.saved(2, made)
    run.logged(2, {})
    assert "1 failed (step 2: PlanError: " in run.drain(120)

"""Real trainings by other releases of verl, each with a torch and a transformers of its time.

`make test-matrix` makes the environments, and unpacks the releases beside them. A run that passes writes its line of
`results.json`, from which the support table in docs/trainers.md is made.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.repository import ROOT
from tests.support.runs import GRPO, SFT, Run, reasons

pytestmark = pytest.mark.matrix
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
ENVIRONMENTS = ROOT / ".venv-matrix"
BEST = 'autoexport.trigger.best={metric:"val-core/*/acc/mean@1",mode:max}'
LOWEST = "autoexport.trigger.best={metric:val/loss,mode:min}"
EVERY_STEP = ("autoexport.trigger.every_n_steps=1", "autoexport.queue.overflow=wait")
PPO_OF_2025, SFT_OF_2025 = (str(HERE / "train_ppo.sh"),), (str(HERE / "train_sft.sh"),)
LINE = re.compile(r"step:(\d+) - (\S+:.*)")


@dataclass(frozen=True)
class Case:
    """A trainer of a release of verl, in the environment that `requirements/<environment>.txt` describes."""

    verl: str
    environment: str
    trainer: str
    command: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def release(self) -> Path:
        return ENVIRONMENTS / f"verl-{self.verl}"


NO_FSDP2 = ("actor_rollout_ref.actor.strategy=fsdp",)  # FSDP2 of torch 2.6 does not train on a CPU
SAVES = ("trainer.save_freq=1", "trainer.test_freq=1", "trainer.total_training_steps=3")
PPO = [
    Case("0.5.0", "torch-2.6", "PPO (legacy)", PPO_OF_2025, NO_FSDP2),
    Case("0.6.1", "torch-2.8", "PPO (legacy)", PPO_OF_2025),
    Case("0.7.1", "torch-2.8", "PPO (legacy)", PPO_OF_2025),
    Case("0.8.0", "torch-2.8", "PPO (legacy)", PPO_OF_2025),
    Case("0.9.0", "torch-2.11", "PPO (v1)", GRPO, SAVES),
    Case("0.9.1", "torch-2.11", "PPO (v1)", GRPO, SAVES),
]
SFT_TORCHRUN = [
    Case("0.5.0", "torch-2.6", "SFT (torchrun)", SFT_OF_2025, ("model.strategy=fsdp",)),
    Case("0.6.1", "torch-2.8", "SFT (torchrun)", SFT_OF_2025),
    Case("0.7.1", "torch-2.8", "SFT (torchrun)", SFT_OF_2025),
    Case("0.8.0", "torch-2.8", "SFT (torchrun)", SFT_OF_2025),
    Case("0.9.0", "torch-2.11", "SFT (torchrun)", (*SFT, "torchrun"), SAVES),
    Case("0.9.1", "torch-2.11", "SFT (torchrun)", (*SFT, "torchrun"), SAVES),
]


def identity(case: Case) -> str:
    return f"verl-{case.verl}"


@pytest.fixture(params=["checkpoint", "live"])
def source(request) -> str:
    return request.param


@pytest.mark.parametrize("case", PPO, ids=identity)
def test_ppo(case: Case, source: str, tmp_path: Path, monkeypatch) -> None:
    """A run is killed while step 2 is exported, and resumes. A copy of running weights dies with its run."""
    run = start(case, tmp_path, monkeypatch)
    overrides = (*case.overrides, *EVERY_STEP, BEST, f"autoexport.source={source}")
    if source == "checkpoint":
        run.train(*overrides, kill_at="step 2 is a milestone")
    else:
        run.train(*overrides, "trainer.total_training_steps=2")
        assert run.code == 0, run.log[-4000:]
    logs = run.log
    run.train(*overrides)
    finish(case, source, run, logs + run.log, best="val-core/tiny/acc/mean@1", worst=-math.inf)


@pytest.mark.parametrize("case", SFT_TORCHRUN, ids=identity)
def test_sft(case: Case, tmp_path: Path, monkeypatch) -> None:
    """The same; two logs make a step."""
    run = start(case, tmp_path, monkeypatch)
    overrides = (*case.overrides, *EVERY_STEP, LOWEST)
    run.train(*overrides, kill_at="step 2 is a milestone")
    logs = run.log
    run.train(*overrides)
    finish(case, "checkpoint", run, logs + run.log, best="val/loss", worst=math.inf)


def start(case: Case, out: Path, monkeypatch) -> Run:
    assert case.python.is_file(), f"{case.python} is missing: run `make test-matrix`"
    monkeypatch.setenv("PYTHONPATH", str(case.release))
    return Run(out, command=case.command, python=str(case.python))


def finish(case: Case, source: str, run: Run, logs: str, best: str, worst: float) -> None:
    """Checks the versions of a whole run of three steps, and writes its line of the results."""
    assert run.code == 0, run.log[-4000:]
    versions = run.versions()
    assert [v["step"] for v in versions] == [1, 2, 3]
    compared = subprocess.run(
        [str(case.python), str(HERE / "compare.py"), str(run.out / "checkpoints")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr[-4000:]
    logged = metrics(logs)
    for version in versions:
        assert version["source"]["kind"] == source
        assert "every_n_steps" in reasons(version)
        assert {check["status"] for check in version["verification"].values()} <= {"passed", "skipped"}
        expected = logged[version["step"]]
        assert expected, "the console shows a step's metrics"
        assert {k: version["metrics"][k] for k in expected} == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    sign = 1 if worst < 0 else -1
    measured = {v["step"]: v["metrics"][best] for v in versions if best in v["metrics"]}
    top = max(measured, key=lambda step: (sign * measured[step], -step))  # the first of equals
    assert run.pointer("best").endswith(f"-step{top}"), measured
    write_result(case, source, checks=versions[-1]["verification"])


def metrics(log: str) -> dict[int, dict[str, float]]:
    """{step: numbers} as verl's console logger printed them; a step that was trained again counts as it was last."""
    found: dict[int, dict[str, float]] = {}
    for step, pairs in LINE.findall(re.sub(r"\x1b\[[0-9;]*m", "", log)):
        values = (pair.rpartition(":") for pair in pairs.split(" - "))
        found.setdefault(int(step), {}).update({k: float(re.sub(r"np\.\w+\((.*)\)", r"\1", v)) for k, _, v in values})
    return found


def write_result(case: Case, source: str, checks: dict[str, dict[str, str]]) -> None:
    """One line for a release, a trainer and a source, with the packages that the environment really has."""
    ask = "import importlib.metadata as m; print(*(m.version(n) for n in ('torch', 'transformers', 'ray')))"
    found = subprocess.check_output([str(case.python), "-c", ask], env=os.environ, text=True).split()
    packages = dict(zip(("torch", "transformers", "ray"), found, strict=True))
    key = f"{case.verl} | {case.trainer} | {source}"
    line = packages | {"checks": {name: check["status"] for name, check in sorted(checks.items())}}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(dict(sorted((results | {key: line}).items())), indent=1) + "\n")

"""Real trainings by other releases of verl, each in an environment of its own, which `make test-matrix` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import ROOT

pytestmark = pytest.mark.matrix
HERE = Path(__file__).parent
TIMEOUT_S = 600
SOURCES = {"checkpoint": (), "live": ("autoexport.source=live",)}
BEST = 'autoexport.trigger.best={metric:"val-core/*/acc/mean@1",mode:max}'


def environment(verl: str) -> Path:
    """The Python of the environment with that verl."""
    python = ROOT / ".venv-matrix" / f"verl-{verl}" / "bin" / "python"
    assert python.is_file(), f"{python} is missing: run `make test-matrix`"
    return python


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("verl", "overrides"),
    [("0.5.0", ("actor_rollout_ref.actor.strategy=fsdp",))],  # FSDP2 of torch 2.6 does not train on a CPU
)
def test_ppo(verl: str, overrides: tuple[str, ...], source: str, tmp_path: Path) -> None:
    """Every step is exported, equals verl's checkpoint of it, and passes every check."""
    python = environment(verl)
    command = ["bash", str(HERE / "train_ppo.sh"), str(tmp_path), "+autoexport=default", BEST, *SOURCES[source]]
    env = os.environ | {"PYTHON": str(python), "PYTHONPATH": ""}
    done = subprocess.run(
        [*command, "autoexport.trigger.every_n_steps=1", "autoexport.queue.overflow=wait", *overrides],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "verl_autoexport: 3 published (v0001-step1, v0002-step2, v0003-step3)" in done.stdout
    compared = subprocess.run(
        [str(python), str(HERE / "compare.py"), str(tmp_path / "checkpoints")], env=env, capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stderr[-4000:]
    lines = compared.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert f" {source} " in line
        assert "failed" not in line
        assert "'logits': 'passed'" in line or source == "live"

"""Start real verl runs on the CPU and read what they left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.support.repository import ROOT, environment

GRPO = (str(ROOT / "examples" / "cpu_grpo" / "train.sh"),)
SFT = (str(ROOT / "examples" / "cpu_sft" / "train.sh"),)
"""The scripts of the examples; that of SFT is also told how to launch."""
CHAIN = "autoexport.chain_callback=tests.support.archive_callback.Archive"
METRIC = "val-core/tiny/acc/mean@1"
TIMEOUT_S = 400


@dataclass
class Run:
    """One run directory; several runs in it resume one another."""

    out: Path
    elsewhere: Path | None = None
    """Where `autoexport.output_dir` is, if not among the checkpoints."""
    command: tuple[str, ...] = GRPO
    python: str = sys.executable
    code: int = -1
    log: str = ""

    @property
    def exports(self) -> Path:
        return self.elsewhere or self.out / "checkpoints" / "exports"

    @property
    def last_line(self) -> str:
        return self.log.strip().splitlines()[-1]

    def train(
        self,
        *overrides: str,
        raise_at: int = -1,
        break_at: int = -1,
        kill_at: str | None = None,
        when: dict[str, Callable[[int], None]] | None = None,
    ) -> Run:
        """Train until it ends, or until `kill_at` (a regular expression) is printed: then SIGKILL everything.

        `when`: what to do once, with the number of the launching process, when an expression is printed.
        `raise_at` and `break_at` are steps at which the user's own callback fails, or takes the exports away.
        """
        env = environment(
            PYTHON=self.python,
            ARCHIVE_DIR=str(self.out / "archive"),
            ARCHIVE_RAISE_AT=str(raise_at),
            ARCHIVE_BREAK_AT=str(break_at),
            ARCHIVE_BREAK=str(self.exports),
        )
        command = ["bash", *self.command, str(self.out), "+autoexport=default", *overrides]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        watchdog = time.monotonic() + TIMEOUT_S
        lines, waiting = [], dict(when or {})
        for line in process.stdout:
            lines.append(line)
            for seen in [expression for expression in waiting if re.search(expression, line)]:
                waiting.pop(seen)(process.pid)
            if (kill_at and re.search(kill_at, line)) or time.monotonic() > watchdog:
                _kill_tree(process.pid)
        self.code, self.log = process.wait(), "".join(lines)
        assert not waiting or kill_at, f"never printed: {list(waiting)}\n{self.log[-4000:]}"
        (self.out / f"log-{time.time():.0f}.txt").write_text(self.log)
        return self

    def logged(self) -> dict[int, dict[str, Any]]:
        """{step: metrics} as verl's own `file` logger wrote them in the last run; a step may be logged in parts."""
        found: dict[int, dict[str, Any]] = {}
        for entry in map(json.loads, (self.out / "metrics.jsonl").read_text().splitlines()):
            found[entry["step"]] = found.get(entry["step"], {}) | entry["data"]
        return found

    def versions(self) -> list[dict[str, Any]]:
        """The `export.json` of every version, by number, plus `dir`."""
        found = []
        for path in sorted(self.exports.glob("v*-step*")):
            found.append(json.loads((path / "export.json").read_text()) | {"dir": path})
        return found

    def superseded(self) -> set[str]:
        return set(json.loads((self.exports / "registry.json").read_text())["superseded"])

    def pointer(self, name: str) -> str:
        return os.readlink(self.exports / name)

    def step_weights(self, step: int, folder: Path | None = None) -> dict[str, torch.Tensor]:
        """The archived checkpoint of `step`, or that in `folder`, joined and cast to bfloat16: the oracle."""
        import torch.distributed.tensor

        folder = folder or self.out / "archive" / f"global_step_{step}" / "actor"
        files = sorted(folder.glob("model_world_size_*.pt"), key=lambda p: int(p.stem.rpartition("_")[2]))
        ranks = [torch.load(f, weights_only=False, map_location="cpu") for f in files]
        joined = {k: torch.cat([r[k].to_local() for r in ranks]) for k in ranks[0]}
        return {k: v.to(torch.bfloat16) for k, v in joined.items()}


def assert_equal_weights(run: Run, version: dict[str, Any], folder: Path | None = None) -> None:
    """Tensor for tensor, bit for bit, and no other tensor."""
    expected, found = run.step_weights(version["step"], folder), {}
    for file in version["dir"].glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), f"{version['dir']}: {name}"


def reasons(version: dict[str, Any]) -> set[str]:
    return {t["policy"] for t in version["triggers"]}


def improvements(logged: dict[int, dict[str, Any]], metric: str, best: float = float("-inf")) -> list[int]:
    """Steps after 0 whose metric is strictly better than all before: written again, to check the product's."""
    steps = []
    for step in sorted(s for s in logged if s > 0 and metric in logged[s]):
        if logged[step][metric] > best:
            best = logged[step][metric]
            steps.append(step)
    return steps


def kill_actor(pid: int) -> None:
    """SIGKILL the export actor of the run that `pid` launched."""
    found = [
        p for p in psutil.Process(pid).children(recursive=True) if any("ray::ExportActor" in c for c in p.cmdline())
    ]
    assert len(found) == 1, found
    found[0].kill()


def _kill_tree(pid: int) -> None:
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue

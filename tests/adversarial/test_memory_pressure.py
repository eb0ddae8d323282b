"""A merge task that uses up the memory of its node: Ray takes it, not training, and it is run again."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest
from safetensors.torch import load_file

from tests.support.repository import environment


@pytest.mark.full
def test_the_merge_task_goes_and_training_stays(tmp_path):
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (4 << 30)) / memory.total  # less than the task takes
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory", tmp_path], capture_output=True, text=True, timeout=240,
        env=environment(RAY_memory_usage_threshold=f"{threshold:.3f}", RAY_memory_monitor_refresh_ms="100"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"written": "model.safetensors", "trainer": 1 << 29}
    assert (tmp_path / "marker").exists(), "the first attempt does not come to its end"
    assert not load_file(tmp_path / "model.safetensors")["w"].any()

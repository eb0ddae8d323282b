"""What a training step pays on the driver: nothing fires, and a milestone fires.

`python -m tests.benchmarks.bench_driver`: a real Ray, export actor, output directory and
FSDP2 checkpoint; only the trainer that would call the driver is missing.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray

from tests.support.sharding import QWEN2, make_checkpoint
from verl_autoexport.config.reading import load_config
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.request import RunInfo

METRICS = {f"timing/metric_{i}": float(i) for i in range(100)} | {"val-core/x/acc/mean@1": 0.5}
QUIET_STEPS, MILESTONES = 5000, 10


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as tmp:
        checkpoints = Path(tmp)
        source = make_checkpoint(checkpoints / "source", QWEN2, world_size=8, reference=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        trigger = {"on_save": True, "best": {"metric": "val-core/*/acc/mean@1"}}
        settings = load_config(
            {"output_dir": str(checkpoints / "exports"), "trigger": trigger, "verify": {"load": False}}
        )
        driver = RunController(settings, RunInfo(checkpoints, run={}))
        driver.begin(0, None)
        driver.logged(1, METRICS)
        quiet = [_ms(driver.logged, step, METRICS) for step in range(2, QUIET_STEPS)]
        fired = []
        for step in range(QUIET_STEPS, QUIET_STEPS + MILESTONES):
            folder = shutil.copytree(source, checkpoints / f"global_step_{step}")
            fired.append(_ms(driver.saved, step, folder) + _ms(driver.logged, step, METRICS))
        print(f"{'step without a milestone':28} median {statistics.median(quiet):8.4f} ms, max {max(quiet):8.3f} ms")
        print(f"{'on_save + log, milestone':28} median {statistics.median(fired):8.3f} ms, max {max(fired):8.3f} ms")
        print(driver.drain(300))


def _ms(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()

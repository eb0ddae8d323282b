"""A node whose memory a merge task uses up, beside an actor that stands for training.

`python -m tests.support.memory FOLDER`, with Ray's threshold in the environment, prints what became of both as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
import torch

from verl_autoexport.merge.job import MergeJob
from verl_autoexport.merge.plan import Output, make_plan, whole
from verl_autoexport.merge.ray_runner import RayRunner
from verl_autoexport.shards.manifest import Shard, ShardManifest, TensorEntry

HOG = 6 << 30  # bytes
SIZE = 1 << 20  # elements


class Greedy:
    """Memory of a source that, the first time it is read, takes far more than the node has to give."""

    block = 1 << 20

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def read(self, into: memoryview, offset: int, end: int) -> None:
        if not self.marker.exists():
            self.marker.touch()
            held = bytearray(HOG)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(60)  # until it is taken away
            raise AssertionError("nothing watches the memory")
        into[:] = bytes(len(into))

    def let_go(self) -> None:
        pass


@ray.remote(num_cpus=0)
class Trainer:
    """As verl's workers: not restarted, its calls not run again, and there before the merge."""

    def __init__(self) -> None:
        self.weights = bytearray(b"x" * (1 << 29))

    def ready(self) -> int:
        return len(self.weights)


@ray.remote(num_cpus=0)
class Exporter:
    def export(self, folder: str) -> str:
        entry = TensorEntry("w", "float32", (SIZE,), (Shard(0, (0,), (SIZE,), 0, 0),))
        manifest = ShardManifest((Greedy(Path(folder, "marker")),), {"w": entry}, 1, "fsdp2", "")
        plan = make_plan(manifest, [Output("w", (SIZE,), "float32", whole("w", (SIZE,)))], 10**9)
        job = MergeJob(plan.files[0], manifest, Path(folder, "model.safetensors"), 1 << 24)
        return RayRunner(1, 0, 60).run([job], lambda nbytes: None)[0].name


def main(folder: str) -> None:
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    exporter = Exporter.remote()
    ray.get(exporter.__ray_ready__.remote())
    trainer = Trainer.remote()
    ray.get(trainer.ready.remote())
    written = ray.get(exporter.export.remote(folder))
    print(json.dumps({"written": written, "trainer": ray.get(trainer.ready.remote())}))


if __name__ == "__main__":
    main(sys.argv[1])

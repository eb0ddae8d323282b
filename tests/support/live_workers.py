"""Workers as verl's, with an FSDP2 model that is trained by hand."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import ray
import torch

from tests.support.exports import tensors
from tests.support.sharding import QWEN2, build
from verl_autoexport.service.controller import RunController

WORLD = 2
MODEL = QWEN2 | {"vocab_size": 4096}  # its blocks are too large for Ray to send them along with a call


@ray.remote(num_cpus=0)
class Worker:
    """As verl's: the training engine is at `.actor.engine`, its model sharded by FSDP2."""

    def __init__(self, rank: int, port: int, config: dict[str, Any] = MODEL) -> None:
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo", rank=rank, world_size=WORLD)
        model = fully_shard(build(config, "float32"))
        self.actor = SimpleNamespace(engine=SimpleNamespace(module=model))

    def train(self, step: int) -> None:
        with torch.no_grad():
            for p in self.actor.engine.module.parameters():
                p.fill_(step)

    def pid(self) -> int:
        return os.getpid()


def make_workers(config: dict[str, Any] = MODEL) -> list[Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [Worker.remote(rank, port, config) for rank in range(WORLD)]


def train(workers, driver: RunController, *steps: float) -> None:
    """All weights become the number of the step; NaN stands for the step after the one before it."""
    for number, step in enumerate(steps):
        ray.get([w.train.remote(step) for w in workers])
        driver.logged(step if step == step else steps[number - 1] + 1, {})
    ray.get([w.train.remote(1000) for w in workers])  # training goes on


def versions(driver: RunController) -> list[Any]:
    return driver.registry.versions()


def values(driver: RunController) -> dict[int, set[float]]:
    """{step: the values in its version}."""
    found = {v.step: tensors(v.path) for v in versions(driver)}
    return {step: {x for t in weights.values() for x in t.unique().tolist()} for step, weights in found.items()}

"""The live source, driver and export actor in a real Ray, over a real FSDP2 model in two workers; no trainer."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from filelock import FileLock
from sharding import QWEN2, build
from test_export import tensors

from verl_autoexport.config import load_config
from verl_autoexport.errors import AutoExportError, SourceError
from verl_autoexport.runtime import capture
from verl_autoexport.runtime.driver import ExportDriver, RunInfo
from verl_autoexport.runtime.live import start_live

WORLD = 2


@ray.remote(num_cpus=0)
class Worker:
    """As verl's: the training engine is at `.actor.engine`, its model sharded by FSDP2."""

    def __init__(self, rank: int, port: int) -> None:
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo", rank=rank, world_size=WORLD)
        model = fully_shard(build(QWEN2, "float32"))
        self.actor = SimpleNamespace(engine=SimpleNamespace(module=model))

    def train(self, step: int) -> None:
        with torch.no_grad():
            for p in self.actor.engine.module.parameters():
                p.fill_(step)


@pytest.fixture(scope="module")
def workers():
    paths = {"PYTHONPATH": os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    yield [Worker.remote(rank, port) for rank in range(WORLD)]
    ray.shutdown()


@pytest.fixture
def start(workers, tmp_path):
    def start(**queue: Any) -> ExportDriver:
        node = {
            "output_dir": str(tmp_path), "source": "live", "verify": {"load": False}, "queue": queue,
            "trigger": {"every_n_steps": 1, "on_train_end": False},
        }  # fmt: skip
        settings = load_config(node)
        driver = ExportDriver(settings, RunInfo(tmp_path, run={}))
        driver.begin(0, 100, start_live(workers, settings, driver.info))
        return driver

    return start


def train(workers, driver: ExportDriver, *steps: int) -> None:
    for step in steps:
        ray.get([w.train.remote(step) for w in workers])
        driver.logged(step, {})
    ray.get([w.train.remote(1000) for w in workers])  # training goes on


def values(driver: ExportDriver) -> dict[int, set[float]]:
    """{step: the values in its version}."""
    found = {v.step: tensors(v.path) for v in driver.registry.versions()}
    return {step: {x for t in weights.values() for x in t.unique().tolist()} for step, weights in found.items()}


def test_each_version_has_the_weights_of_its_step(workers, start):
    driver = start(overflow="wait")
    train(workers, driver, 1, 2, 3, 4, 5)
    assert driver.drain(120).startswith("verl_autoexport: 5 published (")
    assert values(driver) == {step: {float(step)} for step in range(1, 6)}
    kinds = [v.record.source for v in driver.registry.versions()]
    assert {(s["kind"], s["world_size"], s["backend"]) for s in kinds} == {("live", 2, "fsdp2")}


def in_worker(workers, function, *args) -> list[Any]:
    return ray.get([w.__ray_call__.remote(function, *args) for w in workers])


def held(worker: Any) -> list[str]:
    return list(capture._held)


def until(condition, what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.full
def test_the_actor_dies_with_a_snapshot(workers, start):
    """Once while it has one, once while more are being handed over; the workers still hold them."""
    driver = start(overflow="wait")
    train(workers, driver, 1)
    until(lambda: all(in_worker(workers, held)), "the workers hand over")
    time.sleep(0.5)  # the first instance has the snapshot now
    ray.kill(driver.actor, no_restart=False)
    train(workers, driver, 2, 3)
    ray.kill(driver.actor, no_restart=False)
    line = driver.drain(120)
    assert values(driver) == {1: {1.0}, 2: {2.0}, 3: {3.0}}, line
    until(lambda: not any(in_worker(workers, held)), "the workers let go", 10)


def test_without_room_interval_milestones_are_dropped(workers, start):
    size = start().live.nbytes
    driver = start(inflight_bytes=size * 2 - 1, wait_timeout_s=100)
    assert driver.live.room == 1
    train(workers, driver, 1, 2, 3, 4)
    line = driver.drain(120)
    published = values(driver)
    assert published == {step: {float(step)} for step in published}
    assert line.count("coalesced into a later step: 1 snapshots are in flight") == 4 - len(published)


def test_a_step_that_could_not_be_judged_in_time_is_not_exported_with_later_weights(workers, start):
    driver = start(overflow="wait")
    with FileLock(driver.settings.output_dir / ".lock"):  # another process is at work there for long
        ray.get([w.train.remote(1) for w in workers])
        with pytest.raises(AutoExportError):
            driver.logged(1, {})
    train(workers, driver, 2)
    line = driver.drain(120)
    assert "step 1 failed: it could not be judged while the workers held its weights" in line
    assert values(driver) == {2: {2.0}}


def test_a_snapshot_that_can_never_fit_is_refused(start):
    with pytest.raises(SourceError, match=r"a snapshot takes .* GB of Ray's object store, and at most"):
        start(inflight_bytes=1000)


def test_another_worker_is_no_training_engine(workers, start):
    with pytest.raises(SourceError, match="no training engine of the critic in Worker"):
        start_live(workers, load_config({"output_dir": "x", "role": "critic"}), RunInfo("x", run={}))

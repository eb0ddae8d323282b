"""Live milestones while something else fills Ray's object store."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from tests.support.live_workers import make_workers, train, values
from tests.support.repository import import_path
from verl_autoexport.config.reading import load_config
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.live_start import start_live
from verl_autoexport.service.request import RunInfo

STORE = 100_000_000  # bytes


@pytest.fixture
def workers():
    ray.init(
        address="local", num_cpus=2, object_store_memory=STORE, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": import_path()},
    )  # fmt: skip
    yield make_workers()
    ray.shutdown()


@pytest.mark.full
def test_a_full_object_store_loses_no_milestone_and_harms_no_training(workers, tmp_path):
    node = {
        "output_dir": str(tmp_path / "exports"), "source": "live", "verify": {"load": False},
        "queue": {"overflow": "wait"}, "trigger": {"every_n_steps": 1, "on_train_end": False},
    }  # fmt: skip
    settings = load_config(node)
    driver = RunController(settings, RunInfo(tmp_path, run={}))
    driver.begin(0, 100, start_live(workers, settings, driver.info))
    hog = [ray.put(np.zeros(STORE // 8, dtype=np.uint8)) for _ in range(8)]
    held = [ray.get(ref) for ref in hog]  # in use, so that Ray can move none of it to disk
    train(workers, driver, 1, 2)
    line = driver.drain(120)
    assert values(driver) == {1: {1.0}, 2: {2.0}}, line
    del held, hog
    train(workers, driver, 3)
    line = driver.drain(120)
    assert values(driver)[3] == {3.0}, line

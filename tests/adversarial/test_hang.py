"""What never answers is given up, recorded, and does not stand in the way of what comes after, in a real Ray.

The hangs are real: a frozen file system, on which every write waits in the kernel, and stopped processes.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from tests.support.driven_run import Script
from tests.support.ray_processes import process_named
from tests.support.sharding import WIDE, make_checkpoint
from tests.support.waiting import until
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.exporter import Exporter
from verl_autoexport.system.deadlines import Bounded, GivenUp

QUEUE = {"stall_timeout_s": 1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can be frozen."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    commands = [["truncate", "-s", "128M", image], ["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, folder]]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no file system can be mounted here: {getattr(e, 'stderr', e)}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    done = subprocess.run(["fsfreeze", "--freeze", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be frozen here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)


def timed(call: Callable[..., object], *args: object) -> float:
    began = time.monotonic()
    call(*args)
    return time.monotonic() - began


def test_checkpoints_on_a_hung_file_system_hold_training_once(cluster, source, disk):
    run = Script(source, disk)
    run.start(on_save=True, on_train_end=False, queue=QUEUE)
    run.step(1)
    run.saved(3)
    run.driver.ledger.wait(60)
    with frozen(disk):
        with pytest.raises(GivenUp, match=r"saved at step 3: given up after 1 s"):
            run.driver.saved(3, disk / "global_step_3")
        for call in (lambda: run.driver.logged(3, {}), lambda: run.driver.saved(4, disk / "global_step_4")):
            began = time.monotonic()
            with pytest.raises(GivenUp, match="saved at step 3 still hangs"):
                call()
            assert time.monotonic() - began < 0.5
    until(lambda: answers(run.driver.calls), "the hung call ends", 30)
    run.step(5)
    report = run.finish()
    assert sorted(run.live()) == [1, 3, 5], report


def test_an_output_directory_that_hangs_fails_one_milestone_and_the_next_is_exported(cluster, source, disk, tmp_path):
    run = Script(source, tmp_path / "run", disk / "exports")
    run.start(on_save=True, on_train_end=False, queue=QUEUE)
    run.step(1)
    run.driver.ledger.wait(60)

    def impatient(actor: Exporter) -> None:  # only now: the first export in an actor imports for seconds
        actor.settings = replace(actor.settings, queue=replace(actor.settings.queue, stage_timeout_s=3))

    ray.get(run.driver.service.receiver.__ray_call__.remote(impatient))
    with frozen(disk):
        assert timed(run.step, 2) < 3
        assert timed(run.driver.ledger.wait, 60) < 30, "its outcome comes while the file system hangs"
        failures = run.driver.ledger.take()
    assert [f.step for f in failures] == [2]
    assert "given up: starting: no progress for 3 s (queue.stage_timeout_s)" in failures[0].reason
    until(lambda: not any((disk / "exports/.staging").iterdir()), "what was given up is removed", 30)
    run.step(3)
    assert "1 failed (step 2: given up" in run.finish()
    assert sorted(run.live()) == [1, 3]
    until(lambda: not any((disk / "exports/.staging").iterdir()), "what was given up is removed", 30)
    assert sorted(run.live()) == [1, 3], "what was given up is not published later"


def test_a_report_of_a_run_whose_output_directory_hangs_at_the_end(cluster, source, disk, tmp_path):
    run = Script(source, tmp_path / "run", disk / "exports")
    run.start(on_save=True, on_train_end=False, queue=QUEUE)
    run.step(1)
    run.driver.ledger.wait(60)
    with frozen(disk):
        assert timed(run.driver.drain, 60) < 5
        assert "1 published (v0001-step1); the report" in run.driver.drain(1)


@pytest.mark.full
def test_a_stopped_merge_task_fails_one_milestone(cluster, tmp_path, tmp_path_factory):
    run = Script(make_checkpoint(tmp_path_factory.mktemp("wide"), WIDE, reference=False), tmp_path)
    run.start(on_save=True, on_train_end=False, queue={"stage_timeout_s": 15})
    run.step(1)
    task = process_named("ray::merge_task")
    task.send_signal(signal.SIGSTOP)
    try:
        run.driver.ledger.wait(120)
        (failure,) = run.driver.ledger.poll()
        assert "given up: merging: no progress for 15 s" in failure.reason
        run.step(2)
        report = run.finish()
        assert sorted(run.live()) == [2], report
    finally:
        task.send_signal(signal.SIGCONT)
    until(lambda: not any((tmp_path / "exports/.staging").iterdir()), "what was given up is removed", 30)
    assert [v.step for v in Registry(tmp_path / "exports").versions()] == [2]


def test_a_stopped_actor_holds_the_end_for_no_longer_than_asked(cluster, source, tmp_path):
    run = Script(source, tmp_path)
    run.start(on_save=True, on_train_end=False)
    ray.get(run.driver.service.receiver.__ray_ready__.remote())
    actor = process_named("ray::ExportActor")
    actor.send_signal(signal.SIGSTOP)
    try:
        assert timed(run.step, 1) < 2
        began = time.monotonic()
        assert "not finished in time: step 1" in run.driver.drain(1)
        assert time.monotonic() - began < 3
    finally:
        actor.send_signal(signal.SIGCONT)


def answers(calls: Bounded) -> bool:
    """Whether what hung has ended."""
    try:
        return calls.run(5, "asking", lambda: True)
    except GivenUp:
        return False

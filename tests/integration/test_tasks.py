"""The export actor and its merge tasks in a real Ray: no free CPU, killed processes, nodes that see something else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from tests.support.ray_processes import process_named
from tests.support.sharding import WIDE, make_checkpoint
from verl_autoexport.config.reading import load_config
from verl_autoexport.errors import MergeError
from verl_autoexport.export.pipeline import export_to_directory, run_export
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.merge.ray_runner import Home, NotShared, RayRunner
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.request import RunInfo
from verl_autoexport.sources.holds import find_holds, make_hold


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=1, resources={"export_node": 1}, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), WIDE, reference=False)


def driver(tmp_path: Path, **settings) -> RunController:
    defaults = {
        "output_dir": str(tmp_path / "exports"),
        "verify": {"load": False},
        "trigger": {"on_save": True},
        "merge": {"schedule_timeout_s": 1},
    }
    made = RunController(load_config(defaults | settings), RunInfo(tmp_path, run={}))
    made.begin(0, None)
    return made


def save_and_log(made: RunController, source: Path, step: int) -> None:
    made.saved(step, Path(shutil.copytree(source, made.info.checkpoints / f"global_step_{step}")))
    made.logged(step, {"training/x": 1.0})


def test_no_free_cpu_slot_does_not_stop_an_export(cluster, source, tmp_path):
    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self):
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    assert ray.available_resources().get("CPU", 0) == 0
    made = driver(tmp_path, merge={"schedule_timeout_s": 600})
    save_and_log(made, source, 2)
    assert "1 published (v0001-step2)" in made.drain(120)
    ray.kill(holder)


def test_placement_is_kept_to_as_long_as_it_lets_tasks_run(cluster, source, tmp_path, caplog):
    placement = {"resources": {"export_node": 1}, "labels": {}}
    spec = checkpoint_spec(source, verify=False)
    export_to_directory(spec, tmp_path / "free", RayRunner(1, 1, 120, placement))
    assert "continuing with" not in caplog.text

    @ray.remote(num_cpus=0, resources={"export_node": 1})
    class Holder:
        pass

    holder = Holder.remote()
    ray.get(holder.__ray_ready__.remote())
    export_to_directory(spec, tmp_path / "held", RayRunner(1, 1, 1, placement))
    assert "continuing with num_cpus=0" in caplog.text
    assert "no node takes it with merge.placement={'resources': {'export_node': 1}" in caplog.text
    assert "continuing with no placement" in caplog.text
    ray.kill(holder)


def test_labels_say_where(cluster, source, tmp_path, caplog):
    spec, here = checkpoint_spec(source, verify=False), ray.get_runtime_context().get_node_id()
    placement = {"resources": {}, "labels": {"ray.io/node-id": here}}
    export_to_directory(spec, tmp_path / "here", RayRunner(1, 1, 120, placement))
    assert "continuing with" not in caplog.text
    export_to_directory(spec, tmp_path / "nowhere", RayRunner(1, 0, 1, {**placement, "labels": {"zone": "none"}}))
    assert "no node takes it with merge.placement={'resources': {}, 'labels': {'zone': 'none'}}" in caplog.text


def test_a_killed_merge_task_is_run_again(cluster, source, tmp_path):
    made = driver(tmp_path)
    save_and_log(made, source, 2)
    process_named("ray::merge_task").send_signal(signal.SIGKILL)
    assert "1 published (v0001-step2)" in made.drain(120)
    assert sorted(p.name for p in (tmp_path / "exports" / "v0001-step2").glob("*model*")) == ["model.safetensors"]


def test_a_killed_actor_restarts_and_exports_each_step_once(cluster, source, tmp_path):
    made = driver(tmp_path)
    save_and_log(made, source, 2)
    save_and_log(made, source, 4)
    process_named("ray::merge_task")
    process_named("ray::ExportActor").send_signal(signal.SIGKILL)
    report = made.drain(180)
    assert "2 published" in report
    assert sorted(v.step for v in Registry(tmp_path / "exports").versions()) == [2, 4]
    assert list((tmp_path / "exports" / ".staging").iterdir()) == []
    assert find_holds(tmp_path) == []


def test_too_little_time_to_drain_is_reported_and_the_next_start_finishes(cluster, source, tmp_path):
    made = driver(tmp_path)
    save_and_log(made, source, 2)
    assert "not finished in time: step 2" in made.drain(0)
    ray.kill(made.service.receiver)
    assert [p.step for p in find_holds(tmp_path)] == [2]
    again = RunController(made.settings, made.info)
    again.begin(2, None)
    assert "1 published (v0001-step2)" in again.drain(120)


def test_overflow_drops_only_what_may_be_dropped(cluster, source, tmp_path):
    made = driver(tmp_path, trigger={"on_save": True, "at_steps": [3, 4, 5]})
    for step in range(1, 9):
        save_and_log(made, source, step)
    made.drain(300)
    registry = Registry(tmp_path / "exports")
    published = {v.step for v in registry.versions()}
    dropped = {o["step"] for o in registry.outcomes()}
    assert {3, 4, 5, 8} <= published
    assert published | dropped == set(range(1, 9))
    assert not published & dropped
    assert dropped
    assert find_holds(tmp_path) == []


def test_the_command_line_merges_in_a_cluster_if_asked(cluster, source, tmp_path):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "verl_autoexport", "export", source, "--no-verify", "--max-shard-size", "50MB"]
    for name, more in {"here": [], "there": ["--ray-address", address]}.items():
        subprocess.run([*command, "--output", tmp_path / name, *more], check=True)
    files = sorted(p.name for p in (tmp_path / "here").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


class Remembers(LocalRunner):
    def run(self, jobs, progress):
        self.jobs = list(jobs)
        return super().run(jobs, progress)


def test_a_node_where_something_is_otherwise_does_not_merge(cluster, source, tmp_path):
    """Compared in this process, as if it were a task on another node."""
    spec = checkpoint_spec(source, verify=False)
    run_export(spec, tmp_path, runner := Remembers(1))
    (job,) = runner.jobs
    (nonce := tmp_path / "nonce").touch()
    home = replace(Home.here([job], nonce), node="another")
    assert home.compared(job) == replace(job, cached=False, read_again=False)
    assert replace(home, node=ray.get_runtime_context().get_node_id()).compared(job) is job
    path = Path(job.manifest.files[0])
    size, mtime = home.files[path]
    for other in (
        replace(home, nonce=tmp_path / "not there"),
        replace(home, files=dict(home.files) | {path: (size, mtime + 1)}),
        replace(home, files=dict(home.files) | {path: (size + 1, mtime)}),
    ):
        with pytest.raises(NotShared):
            other.compared(job)
    gone = replace(job, manifest=replace(job.manifest, files=(tmp_path / "gone", *job.manifest.files[1:])))
    with pytest.raises(NotShared, match="gone"):
        home.compared(gone)
    with pytest.raises(MergeError, match=r"'torch': '0'.*; install the same everywhere"):
        replace(home, versions=dict(home.versions) | {"torch": "0"}).compared(job)


def test_where_links_are_impossible_the_hold_reads_the_original(source, tmp_path):
    checkpoint = Path(shutil.copytree(source, tmp_path / "global_step_2"))
    shard = next((checkpoint / "actor").glob("model_*_rank_1.pt"))
    if subprocess.run(["chattr", "+i", shard], capture_output=True).returncode:
        pytest.skip("chattr +i, which makes link() fail, is not permitted here")
    try:
        with pytest.raises(PermissionError):
            os.link(shard, tmp_path / "link")
        hold = make_hold(checkpoint, 2, "actor")
        assert not hold.linked
        assert hold.directory == checkpoint / "actor"
    finally:
        subprocess.run(["chattr", "-i", shard], check=True)

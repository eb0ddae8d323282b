"""Three real Ray nodes on one machine, each with checkpoints on a disk of its own: a mount in its own namespace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch

from tests.support.exports import assert_same_model, export
from tests.support.page_cache import resident
from tests.support.repository import import_path
from tests.support.sharding import QWEN2, make_checkpoint
from verl_autoexport.config.reading import load_config
from verl_autoexport.errors import SourceError
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.request import RunInfo
from verl_autoexport.sources.holds import find_holds
from verl_autoexport.sources.nodes.cluster import SpreadFiles, find_nodes

RAY = Path(sys.executable).with_name("ray")
WORLD = 3
CONFIG = QWEN2 | {"vocab_size": 20000}


def can_unshare() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs root: each node mounts a directory of its own")


class Cluster:
    """A head without shards and `WORLD` nodes that each see only their own `shared`; `private` is the head's alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared, self.private = folder, folder / "shared", folder / "private"
        self.shared.mkdir()
        self.private.mkdir()
        self.address = ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
            runtime_env={"env_vars": import_path()},
            _temp_dir=f"/tmp/nodes-{os.getpid()}",  # the path of a socket may not be long
        ).address_info["gcs_address"]  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(WORLD):
            self.start(rank)
        self.workers = [Worker.options(resources={f"rank{r}": 1}).remote() for r in range(WORLD)]

    def start(self, rank: int, cpus: int = 1, **variables: str) -> None:
        own, empty = self.own(rank), self.folder / f"empty{rank}"
        own.mkdir(exist_ok=True)
        empty.mkdir(exist_ok=True)
        script = (
            f"mount --make-rprivate / && mount --bind {own} {self.shared} && mount --bind {empty} {self.private} && "
            f"exec {RAY} start --address={self.address} "
            f"--num-cpus={cpus} --resources='{{\"rank{rank}\": 1}}' --object-store-memory=200000000 --block"
        )
        log = (self.folder / f"node{rank}.log").open("wb")
        command = ["unshare", "--mount", "bash", "-c", script]
        env = os.environ | variables | {"RAY_TMPDIR": f"/tmp/nodes-{os.getpid()}"}
        self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
        deadline = time.monotonic() + 60
        while not any(f"rank{rank}" in n["Resources"] and n["Alive"] for n in ray.nodes()):
            assert time.monotonic() < deadline, (self.folder / f"node{rank}.log").read_text()
            time.sleep(0.2)

    def own(self, rank: int) -> Path:
        """What node `rank` sees as `shared`."""
        return self.folder / f"disk{rank}"

    def spread(self, source: Path, step: int) -> Path:
        """A checkpoint of `step` as verl leaves it: each rank's file on its own node, the config with rank 0."""
        for rank in range(WORLD):
            actor = self.own(rank) / f"global_step_{step}" / "actor"
            shutil.rmtree(actor, ignore_errors=True)
            actor.mkdir(parents=True)
            shutil.copy(source / "actor" / f"model_world_size_{WORLD}_rank_{rank}.pt", actor)
            if rank == 0:
                shutil.copy(source / "actor/fsdp_config.json", actor)
                shutil.copytree(source / "actor/huggingface", actor / "huggingface")
        return self.shared / f"global_step_{step}"

    def kill(self, rank: int) -> None:
        for process in psutil.Process(self.processes[rank].pid).children(recursive=True):
            process.send_signal(signal.SIGKILL)
        self.processes[rank].kill()
        self.processes[rank].wait()

    def stop(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.kill(rank)
        ray.shutdown()
        shutil.rmtree(f"/tmp/nodes-{os.getpid()}", ignore_errors=True)


@ray.remote(num_cpus=0)
class Worker:
    """Where a rank of verl would be."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("nodes"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source"), CONFIG, world_size=WORLD)


@pytest.fixture
def start(cluster, tmp_path):
    drivers = []

    def start(root: Path = tmp_path, **merge) -> RunController:
        node = {
            "output_dir": str(root / "exports"), "verify": {"load": False}, "merge": merge,
            "trigger": {"every_n_steps": 1, "on_train_end": False},
        }  # fmt: skip
        drivers.append(driver := RunController(load_config(node), RunInfo(cluster.shared, run={})))
        nodes = find_nodes(cluster.workers, cluster.shared)
        assert nodes is not None
        driver.begin(0, 100, nodes=nodes)
        return driver

    yield start
    for driver in drivers:
        ray.kill(driver.service.receiver)
        driver.nodes.close()


@pytest.fixture
def driver(start):
    return start()


def left_over(cluster: Cluster) -> list[Path]:
    deadline = time.monotonic() + 10  # releasing waits for nobody
    while (found := list(cluster.folder.glob("*/.autoexport/step_*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.full
@pytest.mark.parametrize("output", ["seen by all", "seen by the head"])
def test_shards_on_three_nodes_make_the_same_model(cluster, source, start, tmp_path, output):
    """What only the head sees is merged there."""
    driver = start(tmp_path if output == "seen by all" else cluster.private)
    driver.saved(1, cluster.spread(source, 1))
    (hold,) = find_holds(cluster.shared)
    assert (hold.spread, hold.linked) == (True, True)
    for rank in range(WORLD):
        shutil.rmtree(cluster.own(rank) / "global_step_1")  # verl rotates it away
    driver.logged(1, {})
    assert "1 published (v0001-step1)" in driver.drain(120)
    export(source, tmp_path / "here")
    version = driver.registry.find("latest")
    assert_same_model(version.path, tmp_path / "here")
    assert version.record.source["world_size"] == WORLD
    assert left_over(cluster) == []


@pytest.mark.full
def test_a_file_that_is_on_no_node_is_named_with_its_rank_and_host(cluster, source, driver):
    checkpoint = cluster.spread(source, 2)
    (cluster.own(1) / f"global_step_2/actor/model_world_size_{WORLD}_rank_1.pt").unlink()
    started = time.monotonic()
    host = os.uname().nodename
    with pytest.raises(SourceError, match=rf"ranks 1 of 3 are not on their own nodes; expected on {host} \(rank 1\)"):
        driver.saved(2, checkpoint)
    assert time.monotonic() - started < 10
    assert left_over(cluster) == []


def by_hand(checkpoint: Path, output: Path, *more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verl_autoexport", "export", checkpoint, "--output", output, "--no-verify", *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.full
def test_the_command_line_finds_them_too(cluster, source, tmp_path):
    checkpoint = cluster.spread(source, 3)
    alone = by_hand(checkpoint, tmp_path / "out")
    assert alone.returncode == 1, alone.stderr
    done = by_hand(checkpoint, tmp_path / "out", "--ray-address", cluster.address)
    assert done.returncode == 0, done.stderr
    export(source, tmp_path / "here")
    assert_same_model(tmp_path / "out", tmp_path / "here")


def leave_older(cluster: Cluster, older: Path, step: int, rank: int, node: int) -> None:
    """What a run with other ranks on this node left there: as large, each checked, of the same step."""
    actor = cluster.own(node) / f"global_step_{step}" / "actor"
    shutil.copy(older / "actor" / f"model_world_size_{WORLD}_rank_{rank}.pt", actor)


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("older"), CONFIG, world_size=WORLD, scale=0.03)


def test_a_rank_is_taken_from_its_own_node(cluster, source, older, driver, tmp_path):
    checkpoint = cluster.spread(source, 6)
    for rank in range(WORLD):
        leave_older(cluster, older, 6, rank, node=(rank + 1) % WORLD)
    os.sync()  # what is dirty stays in the page cache
    driver.saved(6, checkpoint)
    driver.logged(6, {})
    assert "1 published (v0001-step6)" in driver.drain(120)
    export(source, tmp_path / "here")
    assert_same_model(driver.registry.find("latest").path, tmp_path / "here")
    deadline = time.monotonic() + 10  # nothing waits for it
    own = [cluster.own(rank) / f"global_step_6/actor/model_world_size_{WORLD}_rank_{rank}.pt" for rank in range(WORLD)]
    while any(map(resident, own)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(resident, own))
    homes = [driver.nodes.homes[rank] for rank in range(WORLD)]
    found = SpreadFiles(driver.nodes, checkpoint, "actor", homes)  # as where no links can be
    assert [node for node, _, _ in found.ranks] == homes


def test_different_files_of_a_rank_are_refused_where_its_node_is_not_known(cluster, source, older, tmp_path):
    checkpoint = cluster.spread(source, 7)
    leave_older(cluster, older, 7, rank=1, node=2)
    done = by_hand(checkpoint, tmp_path / "out", "--ray-address", cluster.address)
    host = os.uname().nodename
    assert done.returncode == 1
    assert re.search(rf"different files of rank 1 are on {host} \(\w+\) and {host} \(\w+\)", done.stderr)
    assert not (tmp_path / "out").exists()


def test_what_a_run_with_another_world_size_left_is_decided_by_rank_0s_node(cluster, source, driver, tmp_path):
    checkpoint = cluster.spread(source, 11)
    for rank in range(WORLD):
        own = cluster.own(rank) / f"global_step_11/actor/model_world_size_{WORLD}_rank_{rank}.pt"
        shutil.copy(own, own.with_name(f"model_world_size_6_rank_{2 * rank}.pt"))
    driver.saved(11, checkpoint)
    driver.logged(11, {})
    assert "1 published (v0001-step11)" in driver.drain(120)
    export(source, tmp_path / "here")
    assert_same_model(driver.registry.find("latest").path, tmp_path / "here")
    (cluster.own(0) / "global_step_11/actor/fsdp_config.json").unlink()
    done = by_hand(checkpoint, tmp_path / "out", "--ray-address", cluster.address)
    assert done.returncode == 1
    assert "mixed on the nodes: [3, 6], and fsdp_config.json names none." in done.stderr


def test_plain_tensors_are_compared_across_nodes(cluster, source, driver):
    """As persistent buffers are; without CRC-32s their bytes have to be read."""
    checkpoint = cluster.spread(source, 12)
    homes = [driver.nodes.homes[rank] for rank in range(WORLD)]

    def save(rank: int, values: torch.Tensor) -> None:
        path = cluster.own(rank) / f"global_step_12/actor/model_world_size_{WORLD}_rank_{rank}.pt"
        state = torch.load(path, weights_only=False)
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(state | {"a.buffer": values}, path)
        finally:
            torch.serialization.set_crc32_options(True)

    for rank in range(WORLD):
        save(rank, torch.arange(400_000.0))
    found = SpreadFiles(driver.nodes, checkpoint, "actor", homes).manifest()
    assert found.tensors["a.buffer"].shape == (400_000,)
    save(2, torch.arange(400_000.0).roll(1))
    with pytest.raises(SourceError, match=r"a\.buffer: a plain tensor with different values on rank 0 and rank 2"):
        SpreadFiles(driver.nodes, checkpoint, "actor", homes).manifest()


@pytest.mark.full
def test_a_copy_of_a_rank_on_another_node_is_as_good(cluster, source, tmp_path):
    checkpoint = cluster.spread(source, 8)
    held = Path("global_step_8", "actor", f"model_world_size_{WORLD}_rank_1.pt")
    shutil.copy2(cluster.own(1) / held, cluster.own(0) / held)
    done = by_hand(checkpoint, tmp_path / "out", "--ray-address", cluster.address)
    assert done.returncode == 0, done.stderr
    export(source, tmp_path / "here")
    assert_same_model(tmp_path / "out", tmp_path / "here")


@pytest.mark.parametrize("elsewhere", ["nothing", "another checkpoint"])
def test_shards_that_only_the_exporting_node_sees_are_merged_there(cluster, source, older, tmp_path, elsewhere):
    """Where the checkpoint's path holds something else on other nodes, that is not read."""
    step = 9 if elsewhere == "nothing" else 10
    checkpoint = Path(shutil.copytree(source, cluster.shared / f"global_step_{step}"))
    if elsewhere != "nothing":
        for rank in range(WORLD):
            shutil.copytree(older, cluster.own(rank) / f"global_step_{step}")
    done = by_hand(checkpoint, tmp_path / "out", "--ray-address", cluster.address, "--max-shard-size", "1MB")
    assert done.returncode == 0, done.stderr
    export(source, tmp_path / "here")
    assert_same_model(tmp_path / "out", tmp_path / "here")


def cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


@pytest.mark.full
def test_a_node_for_other_things_is_not_asked(cluster, source, tmp_path):
    """What it has installed is not what the export needs, and it holds nothing of it."""
    installed = tmp_path / "transformers-9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\n")
    checkpoint = cluster.spread(source, 11)
    cluster.start(WORLD, cpus=0, PYTHONPATH=f"{tmp_path}{os.pathsep}{import_path()['PYTHONPATH']}")
    try:
        done = by_hand(checkpoint, tmp_path / "out", "--ray-address", cluster.address)
        assert done.returncode == 0, done.stderr
        (cluster.own(1) / f"global_step_11/actor/model_world_size_{WORLD}_rank_1.pt").unlink()
        refused = by_hand(checkpoint, tmp_path / "again", "--ray-address", cluster.address)
        assert re.search(r"ranks 1 of 3 are on no node .* Not asked: .*'transformers': '9\.9'", refused.stderr)
    finally:
        cluster.kill(WORLD)


@pytest.mark.full
def test_killed_actors_of_nodes_come_back(cluster, source, driver):
    started = (p for p in psutil.Process().children(recursive=True) if p.is_running())
    killed = [p for p in started if any("ray::NodeFiles" in word for word in cmdline(p))]
    assert len(killed) >= WORLD
    for process in killed:
        with suppress(psutil.NoSuchProcess):  # it is that of an export by hand, which is over
            process.kill()
    driver.saved(12, cluster.spread(source, 12))
    driver.logged(12, {})
    assert "1 published (v0001-step12)" in driver.drain(120)


@pytest.mark.full
def test_a_damaged_shard_is_found_where_it_lies(cluster, source, driver):
    checkpoint = cluster.spread(source, 4)
    path = cluster.own(2) / f"global_step_4/actor/model_world_size_{WORLD}_rank_2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    driver.saved(4, checkpoint)
    driver.logged(4, {})
    report = driver.drain(120)
    assert "rank_2.pt (rank 2): " in report
    assert "its bytes are not those that training wrote" in report


def test_a_node_that_dies_in_the_middle_fails_the_export_and_nothing_else(cluster, source, start):
    """The last test: the cluster is smaller afterwards."""
    driver = start(memory_budget=65536)  # so that it takes a while
    driver.saved(5, cluster.spread(source, 5))
    driver.logged(5, {})
    staging, deadline = driver.settings.output_dir / ".staging", time.monotonic() + 60
    while not any(p.stat().st_size > 1 << 16 for p in staging.glob("*/*.part*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cluster.kill(2)
    line = driver.drain(120)
    assert "1 failed (step 5: SourceError: " in line
    assert f"model_world_size_{WORLD}_rank_2.pt (rank 2) on {ray.nodes()[0]['NodeManagerHostname']} is lost" in line
    assert driver.registry.versions() == []
    assert list(staging.iterdir()) == []

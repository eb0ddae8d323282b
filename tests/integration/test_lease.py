"""One run at a time exports into an output directory: real processes that live, hang, end, or are killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import fault_library
from tests.support.registry import publish
from tests.support.repository import environment
from verl_autoexport.cli.main import main
from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import lease
from verl_autoexport.registry.store import Registry

OWNER = """
import os, sys, time
from verl_autoexport.registry.store import Registry
lease = Registry.create(sys.argv[1]).own(sys.argv[2])
if len(sys.argv) > 3 and not os.fork():
    time.sleep(60)  # a data loader's worker: it holds whatever its parent had open
print(lease.token, flush=True)
if sys.stdin.readline() == "end\\n":
    lease.release()
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease.take, "__defaults__", (0.5, 1.5))
    monkeypatch.setattr(lease.living, "__defaults__", (0.5, 1.5))


@pytest.fixture
def start(registry, root) -> Iterator[Start]:
    started = []

    def start(run: str = "p/first", *more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", OWNER, str(root), run, *more]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline()
        return process

    yield start
    for process in started:
        for stream in (process.stdin, process.stdout):
            stream.close()
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None or process.args[-1] == "fork" else None
        process.wait()


def elsewhere(root: Path) -> None:
    """The record as another host would have written it: its process numbers mean nothing here."""
    path = root / lease.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"place": "another boot", "host": "far-away"}))


def test_a_second_run_is_refused_with_the_name_of_the_first(start, root):
    first = start()
    for refused in (lambda: Registry(root).own("p/second"), Registry(root).check_free):
        with pytest.raises(RegistryError, match=rf"p/first \(process {first.pid} on .*, since 20.*kill -9 {first.pid}"):
            refused()
    assert lease.read(root).run == "p/first"


def test_a_hung_run_is_still_the_owner(start, root):
    first = start()
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(RegistryError, match="p/first"):
        Registry(root).own("p/second")


def test_a_killed_run_is_followed_at_once_even_if_its_children_live(start, root):
    first = start("p/first", "fork")
    first.kill()  # a zombie for now
    began = time.monotonic()
    Registry(root).own("p/second")
    assert time.monotonic() - began < 0.5
    assert lease.read(root).run == "p/second"


def test_a_run_that_is_just_ending_is_waited_for(start, root):
    first = start()
    first.stdin.write("end\n")
    first.stdin.flush()
    Registry(root).own("p/second")
    assert lease.read(root).run == "p/second"


def test_another_host_is_alive_while_it_touches_its_record(start, root, monkeypatch):
    start()  # it beats every 5 s
    elsewhere(root)
    monkeypatch.setattr(lease.take, "__defaults__", (0.2, 8.0))
    with pytest.raises(RegistryError, match=r"on far-away"):
        Registry(root).own("p/second")


def test_a_silent_host_is_dead_after_a_while(start, root):
    first = start()
    first.kill()
    first.wait()
    elsewhere(root)
    began = time.monotonic()
    Registry(root).own("p/second")
    assert 1.4 < time.monotonic() - began < 5


def test_commands_work_beside_a_run(start, root, registry, capsys):
    start()
    for step in (2, 4):
        publish(registry, step)
    registry.journal("asked", step=6, triggers=[])
    assert main(["prune", str(root), "--last", "1"]) == 0
    assert main(["ls", str(root)]) == 0
    told = capsys.readouterr().out
    assert "step 6: asked for, not finished: being exported by p/first (process" in told


def test_the_next_command_says_what_a_killed_run_left(start, root, registry, capsys):
    first = start()
    registry.journal("asked", step=6, triggers=[])
    first.kill()
    first.wait()
    assert main(["ls", str(root)]) == 0
    assert "step 6: asked for, not finished: interrupted; the next start of the run" in capsys.readouterr().out


# -- file systems whose locks do not work -----------------------------------------------------

RUN = """
import sys
from verl_autoexport.registry.store import Registry
registry = Registry.create(sys.argv[1])
registry.lock_timeout_s = 5
lease = registry.own(sys.argv[2])
print("owner", flush=True)
for line in sys.stdin:
    registry.journal("x")
    print("done", flush=True)
"""
MANY = """
import sys
from tests.support.registry import Registry, publish
registry = Registry(sys.argv[1])
for step in range(8):
    publish(registry, step)
"""
DIES = """
import os, sys
from tests.support.registry import Registry, record
registry = Registry(sys.argv[1])
registry.publish(registry.stage("x"), record(1), begin=lambda: os.kill(os.getpid(), 9))  # while it has the lock
"""
FLAWS = {
    "no lock daemon": errno.ENOLCK,
    "no such call": errno.ENOSYS,
    "not supported": errno.EOPNOTSUPP,
    "both": "both",
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    return fault_library.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture(params=FLAWS.values(), ids=FLAWS)
def flawed(request, shim) -> dict[str, str]:
    """The environment of a process for which locks do not work."""
    return environment(LD_PRELOAD=str(shim), FAULT_FLOCK=str(request.param))


def command(root: Path, *args: str, **options) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "verl_autoexport", args[0], str(root), *args[1:]]
    return subprocess.run(words, capture_output=True, text=True, **options)


def test_without_locks_the_owner_alone_writes(flawed, registry, root):
    for step in (1, 2):
        publish(registry, step)
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, root, "p/first"], env=flawed, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert run.stdout.readline() == "owner\n"
        for words in (("prune", "--last", "1"), ("pin", "1"), ("unpin", "1")):
            done = command(root, *words, env=flawed)
            assert done.returncode == 1, done
            assert "p/first (process" in done.stderr
            assert "locks of this file system do not work" in done.stderr
        assert command(root, "ls", env=flawed).returncode == 0
        assert command(root, "request", env=flawed).returncode == 0
        run.stdin.write("go on\n")
        assert run.stdout.readline() == "done\n"
    finally:
        run.kill()
        told = run.communicate()[1]
    assert "locks do not work on this file system" in told
    done = command(root, "prune", "--last", "1", env=flawed)
    assert done.returncode == 0, "what a killed owner leaves stops nobody"
    assert "locks do not work on this file system" in done.stderr
    assert [v.step for v in registry.versions()] == [2]


def test_without_locks_writers_still_take_turns(flawed, registry, root):
    writers = [subprocess.Popen([sys.executable, "-c", MANY, root], env=flawed) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert [v.number for v in registry.versions()] == list(range(1, 25))
    assert registry.journal_entries()[1] == []


def test_without_locks_a_killed_holder_is_followed(flawed, registry, root):
    assert subprocess.run([sys.executable, "-c", DIES, root], env=flawed).returncode == -9
    code = "import sys; from verl_autoexport.registry.store import Registry\nRegistry(sys.argv[1], 20).journal('x')"
    assert subprocess.run([sys.executable, "-c", code, root], env=flawed).returncode == 0
    assert [e["event"] for e in registry.journal_entries()[0]] == ["x"]

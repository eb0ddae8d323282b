"""The process that compares check sums: it tells what it found, and ends when nobody waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from verl_autoexport.errors import PlanError, SourceError
from verl_autoexport.export.pipeline import LocalRunner, export_to_directory
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.runtime.node_files import NodeFiles
from verl_autoexport.sources.fsdp_files import FsdpFiles
from verl_autoexport.sources.sum_check import SumCheck

START = """
import sys
from pathlib import Path
from verl_autoexport.sources.sum_check import SumCheck
print(SumCheck([Path(sys.argv[1])]).process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """Whoever opens it to read waits for ever."""
    os.mkfifo(tmp_path / "endless")
    return tmp_path / "endless"


def gone(pid: int) -> bool:
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_whole_files(checkpoint):
    with FsdpFiles(checkpoint("even") / "actor").check_sums() as check:
        check.wait()


def test_what_was_looked_at_is_told(checkpoint):
    files, told = FsdpFiles(checkpoint("even") / "actor"), []
    with files.check_sums() as check:
        check.wait(told.append)
    assert sorted(told) == sorted(path.stat().st_size for path in files.paths)


def test_asked_again_on_a_node(own_checkpoint):
    """Ray asks again where an answer was lost: having been asked before is no result."""
    paths = sorted((own_checkpoint("even") / "actor").glob("*.pt"))
    node = NodeFiles()
    assert [node.check_sums("a", paths) for _ in range(2)] == [sum(p.stat().st_size for p in paths)] * 2
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    for _ in range(2):
        with pytest.raises(SourceError, match="not those that training wrote"):
            node.check_sums("a", paths)
    node.stop_sums("b")
    with pytest.raises(SourceError, match="nobody needs"):
        node.check_sums("b", paths)
    assert node.checks == []


def test_modules_in_the_working_directory_are_not_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('not the library')")
    with SumCheck([checkpoint("even") / "actor/model_world_size_2_rank_0.pt"]) as check:
        check.wait()


def test_an_end_without_a_result_is_none(endless):
    with SumCheck([endless]) as check:
        check.process.stdin.close()  # as if its parent were gone
        with pytest.raises(SourceError, match="ended with 1"):
            check.wait()


def test_it_ends_when_it_is_stopped(endless):
    with SumCheck([endless]) as check:
        assert psutil.pid_exists(check.process.pid)
    assert gone(check.process.pid)


def test_it_ends_when_its_parent_is_killed(endless):
    parent = subprocess.Popen(
        [sys.executable, "-c", START, str(endless)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    with parent:
        parent.kill()
    assert gone(pid)


def test_it_is_killed(endless):
    with SumCheck([endless]) as check:
        check.process.send_signal(signal.SIGKILL)
        with pytest.raises(SourceError, match=r"ended with -9: it said nothing\. What is not checked"):
            check.wait()


def test_a_file_that_is_none(tmp_path, endless):
    """It does not wait for the others."""
    (tmp_path / "none").write_bytes(b"none")
    with SumCheck([tmp_path / "none", endless]) as check, pytest.raises(SourceError, match="File is not a zip file"):
        check.wait()


def test_nothing_goes_on_after_a_refusal(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    (made / "actor/huggingface/config.json").unlink()
    before = {p.pid for p in psutil.Process().children()}
    with pytest.raises(PlanError):
        export_to_directory(checkpoint_spec(made), tmp_path / "out", LocalRunner(1))
    assert {p.pid for p in psutil.Process().children()} <= before

"""A fault of the operating system at every single change that an export makes to the disk."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import fault_library
from tests.support.repository import environment
from tests.support.sharding import QWEN2, make_checkpoint

Attempt = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def attempt(tmp_path_factory) -> Iterator[Attempt]:
    """`attempt(nth, err, sticky)`: what became of an export whose nth change to the disk failed."""
    folder = tmp_path_factory.mktemp("faults")
    library = fault_library.build(folder)
    source = make_checkpoint(folder / "source", QWEN2, reference=False)
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.faults", folder, source], env=environment(LD_PRELOAD=str(library)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
    )  # fmt: skip

    def attempt(nth: int, err: int = errno.EIO, sticky: bool = False) -> dict[str, Any]:
        process.stdin.write(json.dumps({"nth": nth, "err": err, "sticky": sticky}) + "\n")
        found = json.loads(process.stdout.readline())
        assert "error" not in found, f"{nth}: {found['error']}"
        return found

    yield attempt
    process.kill()
    process.communicate()
    log.close()


def check(found: dict[str, Any]) -> None:
    """Published or failed with its reason; nothing seen or left that should not be; and then all works again."""
    outcome, where = found["outcome"], f"{found['call']}: {found}"
    assert outcome["status"] in ("published", "failed"), where
    assert (outcome["status"] == "published") == (2 in found["steps"]), where
    assert outcome["status"] == "published" or outcome["reason"], where
    assert found["wrong"] == [], where
    assert found["steps"] in ([1], [1, 2], [2]), where
    # What could not be deleted is not forgotten: the next start does it.
    assert found["left"] == [] or found["call"].startswith(("unlink", "rmdir")) or found["persistent"], where
    assert found["next"]["status"] == "published", where
    assert found["last"] == [3], where
    assert found["left_at_last"] == found["repaired"] == [], where


def every(attempt: Attempt, step: int = 1, **fault: Any) -> dict[str, str]:
    """{call: outcome} of a fault at each call in turn, or at each `step`-th."""
    calls = attempt(0)["calls"]
    assert calls > 60, "the shim sees nothing"
    seen = {}
    for nth in range(1, calls + 1, step):
        found = attempt(nth, **fault) | {"persistent": fault.get("sticky", False)}
        assert found["call"], f"only {found['calls']} calls"
        check(found)
        seen[f"{nth} {found['call']}"] = found["outcome"]["status"]
    return seen


def test_a_fault_at_many_changes(attempt):
    seen = every(attempt, step=4)
    assert {*seen.values()} == {"published", "failed"}


@pytest.mark.full
def test_a_fault_at_every_change(attempt):
    seen = every(attempt)
    calls = {name.split()[1].removesuffix("at") for name in seen}
    assert {"write", "fsync", "rename", "link", "mkdir", "create", "symlink", "unlink"} <= calls
    assert {*seen.values()} == {"published", "failed"}


@pytest.mark.parametrize("err", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.full
def test_every_fault_at_every_change_once_or_from_then_on(attempt, err, sticky):
    seen = every(attempt, err=err, sticky=sticky)
    assert "failed" in seen.values()


def test_a_disk_that_is_full_from_some_change_on(attempt):
    seen = every(attempt, step=9, err=errno.ENOSPC, sticky=True)
    assert "failed" in seen.values()

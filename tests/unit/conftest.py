"""A test of this folder that starts a process fails, at the call that does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import pytest

STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
NEED_PROCESSES = frozenset({"checkpoint", "source", "cluster"})
watched = False


def refuse(what: str) -> NoReturn:
    raise AssertionError(f"{what}: a test of tests/unit starts no process; it belongs in another folder")


def look(event: str, args: tuple[Any, ...]) -> None:
    if watched and event in STARTS:
        refuse(f"{event}{args[:2]}")


sys.addaudithook(look)  # it cannot be taken back, so it asks whether a test of this folder runs


@pytest.fixture(autouse=True)
def no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global watched
    if found := NEED_PROCESSES & {*request.fixturenames}:
        refuse(f"fixtures {sorted(found)}")
    monkeypatch.setattr(BaseProcess, "start", lambda process: refuse(f"{process}"))
    watched = True
    yield
    watched = False

"""Calls that may never return, such as those on a dead file system, with a limit on each wait.

A thread inside such a system call cannot be ended, only left behind. So each call gets a thread
of its own; once it is given up, it may not do anything that its caller no longer expects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any

from verl_autoexport.errors import AutoExportError


class GivenUp(AutoExportError):
    """A call took longer than its limit."""


class Bounded:
    """Runs calls one at a time. While a call that was given up still hangs, further ones are refused at once."""

    def __init__(self) -> None:
        self._future: Future[Any] | None = None
        self._what = ""
        self._gate = threading.Lock()
        self._uncounted = 0.0
        self._given_up = False

    def run(self, limit_s: float, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """The result of `call`, or GivenUp after `limit_s` seconds, without the time spent under `uncounted`."""
        if self._future is not None and not self._future.done():
            raise GivenUp(f"{what}: left out, because {self._what} still hangs; is the file system reachable?")
        self._future, self._what, self._uncounted, self._given_up = start(call, *args), what, 0.0, False
        left = limit_s
        while True:
            wait([self._future], left)
            with self._gate:
                if self._future.done():
                    return self._future.result()
                left, self._uncounted = self._uncounted, 0.0
                if not left:
                    self._given_up = True
                    raise GivenUp(f"{what}: given up after {limit_s:g} s; is the file system reachable?")

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Part of a call with its own limit, or that may not be left behind. GivenUp if the call is given up."""
        with self._gate:
            if self._given_up:
                raise GivenUp(f"{self._what}: it was given up")
            began = time.monotonic()
            try:
                yield
            finally:
                self._uncounted += time.monotonic() - began


class Watch:
    """The progress of an export: its stage, and since when. Raises GivenUp in the export once nobody waits."""

    def __init__(self) -> None:
        self.name = "starting"
        self._moved = time.monotonic()
        self._given_up = False
        self._lock = threading.Lock()

    def stage(self, name: str, total: int | None = None) -> None:
        with self._lock:
            self._check()
            self.name, self._moved = name, time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Records a heartbeat; only bytes count as progress."""
        self._check()
        if nbytes:
            self._moved = time.monotonic()

    def idle_s(self) -> float:
        return time.monotonic() - self._moved

    def give_up(self) -> None:
        """Keeps the export from its next stage."""
        with self._lock:
            self._given_up = True

    def _check(self) -> None:
        if self._given_up:
            raise GivenUp(f"{self.name}: it was given up")


def wait_for(futures: Iterable[Future[Any]], count: int, timeout_s: float) -> int:
    """Waits until `count` of the futures are done, at most `timeout_s` seconds; returns how many are."""
    left, done, deadline = set(futures), 0, time.monotonic() + timeout_s
    while True:
        finished, left = wait(left, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        done += len(finished)
        if done >= count or not left or time.monotonic() >= deadline:
            return done


def start(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """Runs `call` in a daemon thread, which does not delay the end of the process."""
    future: Future[Any] = Future()
    threading.Thread(target=_fill, args=(future, call, args), name="autoexport-call", daemon=True).start()
    return future


def _fill(future: Future[Any], call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        future.set_result(call(*args))
    except BaseException as e:  # noqa: BLE001 - the future raises it for the caller
        future.set_exception(e)

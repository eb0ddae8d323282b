"""Ray's processes, found by what they show."""

from __future__ import annotations

import time

import psutil


def process_named(title: str, timeout_s: float = 60) -> psutil.Process:
    """The Ray process that shows `title`; Ray sets it while it runs that actor or task."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)
    raise AssertionError(f"no process {title}")

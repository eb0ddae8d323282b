"""Ctrl-C, SIGTERM and SIGHUP end the command line with one line and exit code 1, whenever they come."""

from __future__ import annotations

import os
import signal
import time

TYPE_CHECKING = False  # `typing` alone would take longer to import than this module
if TYPE_CHECKING:
    from typing import Any

INTERRUPTED = "interrupted; nothing half-made is left"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_S = 5.0
"""A second signal within this time repeats the first, as `timeout` does; clean-up continues. A later one counts."""
_last = -_SAME_S


def install(raises: bool) -> dict[int, Any]:
    """Makes signals end the process at once or, if `raises`, raise KeyboardInterrupt; returns the former handlers.

    Ending at once is right while there is nothing to clean up: imported code may swallow an exception.
    Ignored signals (`nohup`) stay ignored, and outside the main thread nothing changes.
    """
    handler = _raise if raises else _end
    try:
        return {n: signal.signal(n, handler) for n in _ENDING if signal.getsignal(n) != signal.SIG_IGN}
    except ValueError:  # not the main thread
        return {}


class Handled:
    """A context in which signals are handled so."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def __enter__(self) -> None:
        self.before = install(self.raises)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def came() -> bool:
    """Whether a signal has been raised in this process, and so may have caused any error."""
    return _last > 0


def end(message: str) -> None:
    """Ends this process now, with one line on stderr."""
    try:
        os.write(2, f"verl-autoexport: {message}\n".encode("ascii", "backslashreplace"))
    finally:
        os._exit(1)


def _end(number: int, frame: Any) -> None:
    end(INTERRUPTED)


def _raise(number: int, frame: Any) -> None:
    global _last
    before, _last = _last, time.monotonic()
    if _last - before > _SAME_S:
        raise KeyboardInterrupt

"""The lock of an output directory, with a substitute for file systems without working locks."""

from __future__ import annotations

import fcntl
import logging
import os
from functools import cached_property
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from verl_autoexport.errors import RegistryBusy, RegistryError

NAME = ".lock"
SOFT_SUFFIX = ".soft"
_POLL_S = 0.01

log = logging.getLogger(__name__)


class RootLock:
    """A lock for short critical sections. `flaw`: the reason, once known, why the system's locks do not work here."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / NAME
        self.flaw: str | None = None

    def acquire(self, timeout_s: float) -> None:
        """Takes the lock; raises RegistryBusy if another process holds it for so long."""
        try:
            self._lock.acquire(timeout=timeout_s, poll_interval=_POLL_S)
        except Timeout:
            held = f"{self._lock.lock_file}: held by another process for more than {timeout_s:g} s"
            raise RegistryBusy(f"{held}; find it (`fuser` names it) and end it if it hangs") from None
        except OSError as e:
            raise RegistryError(f"{self.path}: cannot be locked: {e}") from e

    def release(self) -> None:
        self._lock.release()

    def beside(self, path: Path) -> BaseFileLock:
        """A lock of the same kind for a path in this directory; one thread may take it and another release it."""
        kind = FileLock if self.flaw is None else SoftFileLock
        return kind(f"{path}.lock", thread_local=False)

    @cached_property
    def _lock(self) -> BaseFileLock:
        """The lock, chosen when it is first acquired, since a trial of the system's locks creates the file."""
        self.flaw = flaw_of(self.path)
        if self.flaw is None:
            return FileLock(self.path)
        log.warning(
            "verl_autoexport: %s: locks do not work on this file system (%s); a file takes their place, and no command "
            "writes here while a run is alive",
            self.root,
            self.flaw,
        )
        return SoftFileLock(f"{self.path}{SOFT_SUFFIX}")


def flaw_of(path: Path) -> str | None:
    """The reason why locks on `path` (created if needed) exclude nobody; None if they seem to work."""
    first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if (flaw := _try(first)) is not None:
            return flaw or None  # another process holds it, so it works
        second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            flaw = _try(second)
            return "two holders at once" if flaw is None else flaw or None
        finally:
            os.close(second)
    finally:
        os.close(first)


def _try(fd: int) -> str | None:
    """The result of a trial. None: locked; empty: another holder; otherwise the error."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as e:
        return e.strerror or str(e)
    return None

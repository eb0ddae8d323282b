"""A directory of its own that appears whole or not at all, even if its writer is killed.

.NAME.1a2b3c4d.tmp/      the new content, beside its later place NAME
.NAME.1a2b3c4d.tmp.lock  locked by its writer while that lives
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from verl_autoexport.errors import ConfigError


class _Staging:
    """The directory being written; its path is known before it exists, so that nothing can come between."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock_file, self.lock = path, f"{path}.lock", -1

    def make(self) -> None:
        # Open for reading: a file open for writing would prevent a remount of the file system as read-only.
        self.lock = os.open(self.lock_file, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # another export has just taken it for a leftover
            raise OSError(errno.EAGAIN, "another export starts there at this moment") from None
        except OSError:  # no locks on this file system, so nobody takes over leftovers
            pass
        self.path.mkdir()
        os.stat(self.lock_file)  # fails if another export removed the file before it was locked

    def take_over(self) -> None:
        """Takes the directory over from its writer; raises OSError if the writer lives."""
        self.lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.lock)
            raise

    def remove(self) -> None:
        """Removes everything of the directory that can be removed."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            os.unlink(self.lock_file)  # before the lock is released
        if self.lock >= 0:
            os.close(self.lock)


@contextmanager
def appears_whole(output: Path) -> Iterator[Path]:
    """An empty directory beside `output`, which takes its name at the end; an error leaves nothing behind.

    The leftovers of a killed process for the same `output` are removed first.
    """
    target = Path(os.path.realpath(output))
    staging = _Staging(target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _told(output, "cannot be written"):
            _check(output, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            staging.make()
        yield staging.path
        with _told(output, "cannot be put there"):
            staging.path.rename(target)  # over an empty directory, if there is one
    finally:
        staging.remove()


@contextmanager
def _told(output: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ConfigError(f"--output {output}: {what}: {e.strerror}.") from e


def _check(output: Path, target: Path) -> None:
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"--output {output}: exists and is not empty; nothing is overwritten. Name another directory."
        )
    if os.path.ismount(target):
        raise ConfigError(f"--output {output}: a mount point, which cannot be replaced; name a directory in it.")


def _remove_leftovers(target: Path) -> None:
    like = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for name in sorted({name.removesuffix(".lock") for name in os.listdir(target.parent)}):
        if like.fullmatch(name):
            with suppress(OSError):
                left = _Staging(target.parent / name)
                left.take_over()
                left.remove()

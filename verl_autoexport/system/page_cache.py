"""Advice to the kernel on the page cache of files; nothing depends on it."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: starts to write dirty pages, waits for none
_libc = ctypes.CDLL(None)


def drop_cache(path: Path) -> None:
    """Frees the page cache of a file that is not needed soon, except its dirty pages."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hang us
    except OSError:
        return
    try:
        let_go(fd)
    finally:
        os.close(fd)


def let_go(fd: int, begin: int = 0, nbytes: int = 0) -> None:
    """Removes a range of an open file from the page cache; 0 bytes: to its end. Starts to write the dirty pages."""
    with suppress(OSError, AttributeError):  # some file systems take no advice, and macOS has no such call
        os.posix_fadvise(fd, begin, nbytes, os.POSIX_FADV_DONTNEED)


def begin_to_write(fd: int, begin: int, nbytes: int) -> None:
    """Sends dirty pages to the disk, and keeps them cached."""
    with suppress(AttributeError):  # glibc and musl have it; errors, such as for a pipe, are its result
        _libc.sync_file_range(fd, ctypes.c_int64(begin), ctypes.c_int64(nbytes), _WRITE)

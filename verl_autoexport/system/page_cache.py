"""Advice to the kernel on what it caches of files; nothing depends on its being taken."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin to write dirty pages, wait for none
_libc = ctypes.CDLL(None)


def drop_cache(path: Path) -> None:
    """Free the page cache of a file that is not needed soon; what is dirty stays."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hang us
    except OSError:
        return
    try:
        let_go(fd)
    finally:
        os.close(fd)


def let_go(fd: int, begin: int = 0, nbytes: int = 0) -> None:
    """The same of an open file, from a byte on; 0 bytes: to its end. What is dirty begins to be written."""
    with suppress(OSError, AttributeError):  # not every file system takes advice, and macOS has no such call
        os.posix_fadvise(fd, begin, nbytes, os.POSIX_FADV_DONTNEED)


def begin_to_write(fd: int, begin: int, nbytes: int) -> None:
    """Send what is dirty to the disk, and keep it cached."""
    with suppress(AttributeError):  # glibc and musl have it; errors, such as of a pipe, are its result
        _libc.sync_file_range(fd, ctypes.c_int64(begin), ctypes.c_int64(nbytes), _WRITE)

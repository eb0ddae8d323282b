"""One output file, written at any position and hashed in order at the same time."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from threading import Condition

import psutil

from verl_autoexport.errors import MergeError
from verl_autoexport.system.page_cache import begin_to_write, let_go

_WRITE = 1 << 20  # bytes per call; larger writes are several times slower (ext4, Linux 6.18)
_BEHIND = 64 << 20  # bytes before they are sent to the disk, so that the last flush is short
SERVER_COPIES = frozenset({"nfs4", "cifs", "smb3", "ceph"})
"""File systems on which the server does `copy_file_range`, so that bytes cross the network once less.

On others reading and writing is faster (ext4, Linux 6.18: 1.8 x), since the hash needs the bytes anyway.
"""
_CANNOT = {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY}


class FileWriter:
    """Writes blocks at their positions, from several threads, and hashes them in the order of the file.

    A context manager; `path` must not exist. `read_again` False keeps the written bytes out of the
    page cache. Raises MergeError naming the file.
    """

    def __init__(self, path: Path, read_again: bool = True) -> None:
        self.path, self.read_again = path, read_again
        self.digest = hashlib.sha256()
        self.turn = Condition()
        self.hashed = self.advised = 0  # bytes from the beginning of the file
        self.ready: dict[int, bytes | memoryview] = {}  # by offset: written, not yet hashed
        self.hashing = False
        self.broken: BaseException | None = None
        self.copies = file_system(path) in SERVER_COPIES  # until a copy is refused

    def __enter__(self) -> FileWriter:
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be created: {e.strerror}.") from e
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes a block at a byte offset; a call of `hash` for it must follow."""
        rest = memoryview(data)
        try:
            while rest:
                n = os.pwrite(self.fd, rest[:_WRITE], offset)
                rest, offset = rest[n:], offset + n
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be written: {e.strerror}.") from e

    def copy(self, source: int, offset: int, nbytes: int, to: int) -> bool:
        """Has the kernel copy bytes of an open file to the byte offset `to`; `read_back` and `hash` must follow.

        False, without a copy, if the file systems cannot copy to each other, or gain nothing from it.
        """
        done = 0
        while self.copies and done < nbytes:
            try:
                n = os.copy_file_range(source, self.fd, nbytes - done, offset + done, to + done)
            except OSError as e:
                if e.errno not in _CANNOT or done:
                    raise MergeError(f"{self.path}: cannot be written: {e.strerror}.") from e
                self.copies = False
                return False
            if n == 0:
                raise MergeError(f"{self.path}: its source ends {nbytes - done} bytes too early; it was truncated.")
            done += n
        return self.copies

    def read_back(self, into: memoryview, offset: int) -> None:
        """Fills `into` with the file's content from `offset` on."""
        done = 0
        try:
            while done < len(into):
                if not (n := os.preadv(self.fd, [into[done:]], offset + done)):
                    raise MergeError(f"{self.path}: holds {offset + done} bytes, {offset + len(into)} were written.")
                done += n
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be read back: {e.strerror}.") from e

    def hash(self, data: bytes | memoryview, offset: int) -> None:
        """Hashes a block of the file once all earlier ones are; it must not change before `wait` returns.

        If another thread is hashing, that thread takes the block over.
        """
        with self.turn:
            self.ready[offset] = data
            if self.hashing:
                return
            self.hashing = True
        while (following := self._next()) is not None:
            self.digest.update(following)
            self._advance(len(following))

    def _next(self) -> bytes | memoryview | None:
        with self.turn:
            following = self.ready.pop(self.hashed, None)
            self.hashing = following is not None
            return following

    def _advance(self, nbytes: int) -> None:
        with self.turn:
            self.hashed = end = self.hashed + nbytes
            self.turn.notify_all()
        if end - self.advised >= _BEHIND:
            self.send(end)

    def send(self, end: int) -> None:
        """Starts to write the bytes before `end` to the disk."""
        if self.read_again:
            begin_to_write(self.fd, self.advised, end - self.advised)
        else:
            let_go(self.fd, 0, end)  # starts to write dirty pages, and drops the clean ones of the call before
        self.advised = end

    def wait(self, end: int) -> None:
        """Waits until all bytes before `end` are hashed. Raises the error that `break_off` was given."""
        with self.turn:
            self.turn.wait_for(lambda: self.broken or self.hashed >= end)
            if self.broken:
                raise self.broken

    def break_off(self, error: BaseException) -> None:
        """Ends all waiting for bytes that will not come; only the first error is reported."""
        with self.turn:
            self.broken = self.broken or error
            self.turn.notify_all()

    def finish(self) -> tuple[str, int]:
        """Makes the file durable; returns sha256 (hex) and size in bytes."""
        try:
            os.fsync(self.fd)
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be flushed to disk: {e.strerror}.") from e
        if not self.read_again:
            let_go(self.fd)
        return self.digest.hexdigest(), self.hashed


def file_system(path: Path) -> str:
    """The type of the file system that `path` is, or would be, in; empty if it is unknown."""
    try:
        path = path.resolve()
        mounted = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    except OSError:  # some processes may not see the mounts
        return ""
    return next((mounted[str(p)] for p in (path, *path.parents) if str(p) in mounted), "")

"""One output file, written front to back and hashed as it is written."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from verl_autoexport.errors import MergeError

_COPY = 64 << 20  # bytes that the kernel copies at a time
_BEHIND = 64 << 20  # bytes after which those written before are sent to the disk and leave the page cache
_CANNOT = {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY}


class FileWriter:
    """Writes and hashes blocks in order, in two threads, one block behind the caller.

    A context manager; `path` must not exist. `cached` False keeps the page cache free of what
    was written. Every method raises MergeError naming the file.
    """

    def __init__(self, path: Path, cached: bool = True) -> None:
        self.path, self.cached = path, cached
        self.hash = hashlib.sha256()
        self.size = 0
        self.advised = 0
        self.copies = True  # until the file system says that it cannot
        self.pending: list[Future[None]] = []

    def __enter__(self) -> FileWriter:
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be created: {e.strerror}.") from e
        self.pool = ThreadPoolExecutor(2)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True)
        os.close(self.fd)

    def write(self, data: bytes | memoryview) -> None:
        """Hand over a block; `data` must not change until the next call returns."""
        self._wait()
        self.pending = [self.pool.submit(self._hash, data), self.pool.submit(self._write, data, self.size)]
        self.size += len(data)

    def copy(self, source: int, offset: int, nbytes: int) -> bool:
        """Let the kernel copy bytes of an open file, unhashed: `read_back` and `hashed` must follow for all of them.

        Where the file systems share blocks, or a server copies, no byte moves. False, and nothing
        done, where they cannot copy between each other.
        """
        self._wait()
        done = 0
        while self.copies and done < nbytes:
            try:
                n = os.copy_file_range(source, self.fd, min(_COPY, nbytes - done), offset + done, self.size + done)
            except OSError as e:
                if e.errno not in _CANNOT or done:
                    raise MergeError(f"{self.path}: cannot be written: {e.strerror}.") from e
                self.copies = False
                return False
            if n == 0:
                raise MergeError(f"{self.path}: its source ends {nbytes - done} bytes too early; it was truncated.")
            done += n
        self.size += done
        return self.copies

    def read_back(self, into: memoryview, offset: int) -> None:
        """Fill `into` with what the file holds from `offset` on."""
        done = 0
        try:
            while done < len(into):
                if not (n := os.preadv(self.fd, [into[done:]], offset + done)):
                    raise MergeError(f"{self.path}: holds {offset + done} bytes, {offset + len(into)} were written.")
                done += n
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be read back: {e.strerror}.") from e

    def hashed(self, data: memoryview) -> None:
        """Hash a block that is in the file already; it must not change until the next call returns."""
        self._wait()
        self.pending = [self.pool.submit(self._hash, data)]

    def finish(self) -> tuple[str, int]:
        """Make it durable; returns sha256 (hex) and size in bytes."""
        self._wait()
        try:
            os.fsync(self.fd)
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be flushed to disk: {e.strerror}.") from e
        if not self.cached:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return self.hash.hexdigest(), self.size

    def _wait(self) -> None:
        for future in self.pending:
            future.result()
        self.pending = []
        if not self.cached and self.size - self.advised >= _BEHIND:
            # Dirty pages begin to be written at this advice, clean ones are dropped: those of the time before.
            os.posix_fadvise(self.fd, 0, self.size, os.POSIX_FADV_DONTNEED)
            self.advised = self.size

    def _hash(self, data: bytes | memoryview) -> None:
        self.hash.update(data)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                n = os.pwrite(self.fd, rest, offset)
                rest, offset = rest[n:], offset + n
        except OSError as e:
            raise MergeError(f"{self.path}: cannot be written: {e.strerror}.") from e


def drop_cache(path: Path) -> None:
    """Advise the kernel to free the page cache of a file that is not needed soon; what is dirty stays."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # advice only
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)

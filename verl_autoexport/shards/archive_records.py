"""The records of the zip archives that `torch.save` writes: their checksums, and whether their content still matches.

torch puts a CRC-32 of every storage into the directory at the end of a file. If training has switched that off
(`torch.serialization.set_crc32_options`), or the file has no directory, size and time replace the checksums.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.checksums import Run, combine

_BLOCK = 1 << 20  # bytes per read
_TAIL = 64 << 10  # bytes of the first read; enough for the directory of some hundred storages
_END, _END64, _ENTRY = b"PK\x05\x06", b"PK\x06\x06", b"PK\x01\x02"
_IN_64 = 0xFFFFFFFF  # the number is in the extra field


class Record(NamedTuple):
    """A record's bytes in its file, and the CRC-32 that was written for them."""

    name: str
    begin: int
    nbytes: int
    crc: int


class Mark(NamedTuple):
    """The identity of a file's content; `checked`: the file has CRC-32s."""

    name: str
    content: str
    checked: bool


def mark(path: Path) -> Mark:
    """The mark of a file, from one small read; raises SourceError if the file is gone."""
    try:
        with _opened(path) as fd:
            entries = list(_entries(_directory(fd)))
            if any(crc for *_, crc in entries):
                listed = repr([(name, nbytes, crc) for name, _, nbytes, crc in entries])
                return Mark(path.name, hashlib.sha256(listed.encode()).hexdigest()[:32], True)
            seen = os.fstat(fd)
            return Mark(path.name, f"{seen.st_size} {seen.st_mtime_ns}", False)
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}; the checkpoint was removed while it was being used.") from e


def read_records(path: Path) -> tuple[Record, ...]:
    """All records of a file, in its order; none if it has no CRC-32s. Raises SourceError."""
    try:
        with _opened(path) as fd:
            entries = list(_entries(_directory(fd)))
            if not any(crc for *_, crc in entries):
                return ()
            return tuple(Record(name, _begin(fd, header), nbytes, crc) for name, header, nbytes, crc in entries)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}.") from e


def difference(
    path: Path, records: Sequence[Record], runs: Sequence[Run], going_on: Callable[[], bool] = lambda: True
) -> tuple[Record, int] | None:
    """The first record with another content than was written, and its CRC-32 now; None if there is none.

    The bytes in `runs` (in order) have been read already, the others are read here; bytes that were read several
    times must have been the same each time. Raises SourceError.
    """
    number = 0
    try:
        with _opened(path) as fd:
            for record in sorted(records, key=lambda r: r.begin):
                end, own = record.begin + record.nbytes, []
                while number < len(runs) and runs[number].begin < end:
                    own.append(runs[number])
                    number += 1
                if own and (own[0].begin < record.begin or max(run.end for run in own) > end):
                    raise SourceError(f"{path}: the bytes read are not in its directory; the file is damaged.")
                while own is not None and going_on():
                    found, own = _crc(path, fd, record, own, going_on)
                    if found != record.crc and going_on():
                        return record, found
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}.") from e
    if number < len(runs):
        raise SourceError(f"{path}: the bytes read are not in its directory; the file is damaged.")
    return None


def _crc(
    path: Path, fd: int, record: Record, runs: Sequence[Run], going_on: Callable[[], bool]
) -> tuple[int, list[Run] | None]:
    """The CRC-32 of a record from those of `runs` that do not overlap; the others are left for the next call."""
    crc, at, left = 0, record.begin, []
    for run in (*runs, Run(0, end := record.begin + record.nbytes, end, 0)):
        if run.begin < at:
            left.append(run)
            continue
        crc = _read_on(path, fd, at, run.begin, crc, going_on)
        crc, at = combine(crc, run.crc, run.end - run.begin), run.end
    return crc, left or None


def _read_on(path: Path, fd: int, at: int, end: int, crc: int, going_on: Callable[[], bool]) -> int:
    """The CRC-32 `crc` of the bytes before `at`, continued over the bytes up to `end`."""
    block = memoryview(bytearray(min(_BLOCK, end - at)))
    while at < end and going_on():
        n = os.preadv(fd, [block[: end - at]], at)
        if n == 0:
            raise SourceError(f"{path}: ends at byte {at}; the file was truncated while being exported.")
        crc, at = zlib.crc32(block[:n], crc), at + n
    return crc


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait forever
    try:
        yield fd
    finally:
        os.close(fd)


def _directory(fd: int) -> bytes:
    """The directory of the archive, empty if there is none."""
    size = os.fstat(fd).st_size
    tail = os.pread(fd, _TAIL, max(0, size - _TAIL))
    if (place := tail.rfind(_END)) < 0 or len(tail) < place + 22:
        return b""
    nbytes, begin = _number(tail, place + 12, 4), _number(tail, place + 16, 4)
    if _IN_64 in (nbytes, begin):
        if (place := tail.rfind(_END64, 0, place)) < 0:
            return b""
        nbytes, begin = _number(tail, place + 40, 8), _number(tail, place + 48, 8)
    if begin + nbytes > size:
        return b""
    offset = begin - (size - len(tail))
    found = tail[offset : offset + nbytes] if offset >= 0 else os.pread(fd, nbytes, begin)
    return found if len(found) == nbytes else b""


def _entries(directory: bytes) -> Iterator[tuple[str, int, int, int]]:
    """The name, header offset, number of bytes and CRC-32 of each record."""
    at = 0
    while directory[at : at + 4] == _ENTRY:
        crc, nbytes = _number(directory, at + 16, 4), _number(directory, at + 24, 4)
        lengths = [_number(directory, at + i, 2) for i in (28, 30, 32)]
        header, name = _number(directory, at + 42, 4), directory[at + 46 : at + 46 + lengths[0]]
        extra = directory[at + 46 + lengths[0] : at + 46 + sum(lengths[:2])]
        if _IN_64 in (nbytes, header):
            nbytes, header = _large(extra, nbytes, _number(directory, at + 20, 4), header)
        yield name.decode("utf-8", "replace"), header, nbytes, crc
        at += 46 + sum(lengths)


def _large(extra: bytes, nbytes: int, packed: int, header: int) -> tuple[int, int]:
    """The number of bytes and the offset of a record for which four bytes are too few."""
    at = 0
    while at + 4 <= len(extra) and _number(extra, at, 2) != 1:
        at += 4 + _number(extra, at + 2, 2)
    at += 4
    found = []
    for number in (nbytes, packed, header):
        found.append(_number(extra, at, 8) if number == _IN_64 else number)
        at += 8 * (number == _IN_64)
    return found[0], found[2]


def _begin(fd: int, header: int) -> int:
    """The first byte of a record's data, after its name and an extra field, which pads it to an alignment."""
    lengths = os.pread(fd, 4, header + 26)
    return header + 30 + _number(lengths, 0, 2) + _number(lengths, 2, 2)


def _number(data: bytes, at: int, nbytes: int) -> int:
    return int.from_bytes(data[at : at + nbytes], "little")

"""CRC-32s of parts of files, combined in any order; standard library only."""

from __future__ import annotations

import zlib
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # the polynomial 1 over GF(2), reflected as in zlib


class Run(NamedTuple):
    """The bytes from `begin` to `end` of file number `file` of a manifest, as they were read."""

    file: int
    begin: int
    end: int
    crc: int


class Sums:
    """The runs read from several files. Thread-safe; a run that follows another one is joined to it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.open: dict[tuple[int, int], Run] = {}  # by file and end
        self.closed: set[Run] = set()  # runs that were read twice

    def add(self, file: int, begin: int, data: memoryview) -> None:
        """Notes that `data` was read from the byte `begin` on."""
        crc, end = zlib.crc32(data), begin + len(data)
        with self.lock:
            if before := self.open.pop((file, begin), None):
                begin, crc = before.begin, combine(before.crc, crc, len(data))
            run = Run(file, begin, end, crc)
            if (known := self.open.setdefault((file, end), run)) != run:
                self.closed.add(run if known.begin <= begin else known)
                self.open[file, end] = known if known.begin <= begin else run

    def runs(self) -> tuple[Run, ...]:
        """All runs, each once, in order of file and begin."""
        return tuple(join({*self.open.values(), *self.closed}))


def join(runs: set[Run]) -> list[Run]:
    """The runs with neighbours joined; overlapping ones stay apart."""
    joined: list[Run] = []
    for run in sorted(runs):
        last = joined[-1] if joined else None
        if last is not None and (last.file, last.end) == (run.file, run.begin):
            joined[-1] = Run(run.file, last.begin, run.end, combine(last.crc, run.crc, run.end - run.begin))
        else:
            joined.append(run)
    return joined


def combine(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of a sequence of bytes: `first` is that of its front, `second` that of the last `nbytes`."""
    return _times(_power(nbytes), first) ^ second


@lru_cache(maxsize=4096)  # a few lengths of parts recur
def _power(nbytes: int) -> int:
    """x to the power of the bits in `nbytes`, modulo the polynomial of CRC-32."""
    result, square, bits = _ONE, _ONE >> 1, nbytes << 3
    while bits:
        if bits & 1:
            result = _times(square, result)
        square, bits = _times(square, square), bits >> 1
    return result


def _times(a: int, b: int) -> int:
    """The product of two polynomials, modulo that of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product

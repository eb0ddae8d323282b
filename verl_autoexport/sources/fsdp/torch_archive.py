"""The zip archive that `torch.save` writes, read without torch."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_autoexport.errors import SourceError

_MAX_PICKLE = 256 << 20  # bytes; names and shapes of half a million tensors
_SMALL = {"byteorder": b"little", ".format_version": b"1"}
"""The entries that torch writes beside pickle and storages, with the values readable here."""


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage's bytes in the file: their place, number, and the CRC-32 that torch wrote for them (0: none)."""

    begin: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """The pickle in a file, and its storages by the key that the pickle uses for them."""

    pickled: bytes
    storages: Mapping[str, Storage]


def read_archive(path: Path, rank: int) -> Archive:
    """Reads the directory and the pickle of an archive, but no weight.

    Raises SourceError unless the archive is whole and as torch writes it: each record occurs once, uncompressed
    and without overlap, and the pickle matches its checksum.
    """
    where = f"{path} (rank {rank})"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO of this name must not hang the reader
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SourceError(f"{where}: not a regular file; expected a file that training saved.")
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                _check_records(records, archive.start_dir, where)
            return _read(fd, records, archive.start_dir, where)
    except SourceError:
        raise
    except Exception as e:  # zipfile raises what its parsers do: BadZipFile, OverflowError, UnicodeDecodeError …
        raise SourceError(f"{where}: not a whole torch file: {e!r:.300}. It is truncated or damaged.") from e


def _check_records(records: Sequence[zipfile.ZipInfo], end: int, where: str) -> None:
    names = [r.filename.lower() for r in records]  # torch finds records by names in any case
    if (count := sum(name.rpartition("/")[2] == "data.pkl" for name in names)) != 1:
        raise SourceError(f"{where}: {count} pickles in it, expected one; not a torch file.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise SourceError(f"{where}: {twice[0]!r:.100} is in it more than once; torch writes no such file.")
    for record in records:
        packed = record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
        if packed or record.file_size > end or record.flag_bits & 1:
            raise SourceError(
                f"{where}: {record.filename!r:.100} would unpack to {record.file_size} bytes; "
                "torch never packs its files, so this is not one that training wrote."
            )


def _read(fd: int, records: Sequence[zipfile.ZipInfo], end: int, where: str) -> Archive:
    begins = [_begin(fd, r) for r in records]
    spans = sorted((r.header_offset, begin + r.file_size) for r, begin in zip(records, begins, strict=True))
    if any(b > a for (_, b), (a, _) in zip(spans, [*spans[1:], (end, end)], strict=True)):
        raise SourceError(f"{where}: its records overlap or go beyond its end; the file is truncated or damaged.")
    if spans[0][0]:
        raise SourceError(f"{where}: not a whole torch file: {spans[0][0]} bytes of something else are in front.")
    places = {r.filename: Storage(begin, r.file_size, r.CRC) for r, begin in zip(records, begins, strict=True)}
    name = next(name for name in places if name.lower().endswith("data.pkl"))
    prefix = name[: -len("data.pkl")]
    for other, expected in _SMALL.items():
        if (place := places.get(prefix + other)) and (
            found := os.pread(fd, 16, place.begin)[: place.nbytes]
        ) != expected:
            raise SourceError(f"{where}: its {other} is {found!r}, expected {expected!r}; it cannot be read here.")
    place = places[name]
    if place.nbytes > _MAX_PICKLE:
        raise SourceError(f"{where}: more than {_MAX_PICKLE} bytes of names and shapes.")
    pickled = os.pread(fd, place.nbytes, place.begin)
    if place.crc not in (0, zlib.crc32(pickled)):  # 0: training has switched checksums off
        raise SourceError(
            f"{where}: its names and shapes are not those that training wrote: the checksum of "
            f"{name!r:.100} differs. A disk or a copy damaged it; copy or save it again."
        )
    data = f"{prefix}data/"
    return Archive(pickled, {n.removeprefix(data): s for n, s in places.items() if n.startswith(data)})


def _begin(fd: int, record: zipfile.ZipInfo) -> int:
    """The first byte of a record's data, after its name and an extra field, which pads it to an alignment."""
    head = os.pread(fd, 30, record.header_offset)
    if len(head) != 30 or not head.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile(f"no {record.filename[:100]!r} at byte {record.header_offset}")
    return record.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:], "little")

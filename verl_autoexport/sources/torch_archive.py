"""The zip archive that `torch.save` writes: what it says of itself, and whether its bytes are still the same."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_autoexport.errors import SourceError

_BLOCK = 1 << 20  # bytes read at a time
_MAX_PICKLE = 256 << 20  # bytes; names and shapes of a million tensors
_ALLOCATES = (b"builtin", b"bytearray")
"""Module and name of what `weights_only` lets a pickle call, and what then takes as much memory as that asks for.

Names can be written in no other way in what it reads (`torch._weights_only_unpickler`, 2.13)."""


@dataclass(frozen=True)
class Storage:
    """One storage's bytes in the file: how many, and the CRC-32 that torch wrote of them (0: none)."""

    nbytes: int
    crc: int


def read_archive(path: Path, rank: int) -> dict[int, Storage]:
    """The storages in a file, by their first byte; reads no weight.

    Refuses what would take memory that no file of this size holds, before anything is
    unpickled. Files that are no archive, or a damaged one, are left to torch's own message: they have
    no storages. Raises SourceError.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            _check_sizes(records, path, rank)
            begins = {r.filename: _begin(file.fileno(), r) for r in records}
            names = [r for r in records if r.filename.endswith("data.pkl")]
            pickles = [os.pread(file.fileno(), r.file_size, begins[r.filename]) for r in names]
            data = (r for r in records if "/data/" in r.filename)
            storages = {begins[r.filename]: Storage(r.file_size, r.CRC) for r in data}
    except SourceError:
        raise
    except Exception:  # noqa: BLE001 - torch reads it next and says what is wrong
        return {}
    if any(all(name in pickled for name in _ALLOCATES) for pickled in pickles):
        raise SourceError(
            f"{path} (rank {rank}): its pickle calls bytearray, which no shard needs and which "
            "`weights_only` lets take any amount of memory; this is not a file that training wrote."
        )
    return storages


def _check_sizes(records: Sequence[zipfile.ZipInfo], path: Path, rank: int) -> None:
    size = path.stat().st_size
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise SourceError(
                f"{path} (rank {rank}): {record.filename!r:.100} would unpack to {record.file_size} bytes; "
                "torch never packs its files, so this is not one that training wrote."
            )
        if record.filename.endswith("data.pkl") and record.file_size > _MAX_PICKLE:
            raise SourceError(f"{path} (rank {rank}): more than {_MAX_PICKLE} bytes of names and shapes.")


def _begin(fd: int, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its name and an extra field, which here pads to an alignment."""
    lengths = os.pread(fd, 4, record.header_offset + 26)
    behind = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return record.header_offset + 30 + behind


def check_sums(path: Path) -> None:
    """Read a file whole and compare with the CRC-32 that torch wrote beside each storage; raises SourceError."""
    try:
        with zipfile.ZipFile(path) as archive:
            # 0: training has switched them off (`torch.serialization.set_crc32_options`)
            for record in (r for r in archive.infolist() if r.CRC):
                with archive.open(record) as f:
                    while f.read(_BLOCK):
                        pass
    except Exception as e:  # zipfile raises what its parsers do: zlib.error, UnicodeDecodeError, NotImplementedError …
        raise SourceError(
            f"{path}: its bytes are not those that training wrote: {e!r}. A disk or a copy damaged it; copy or save it "
            "again."
        ) from e

"""The zip archive that `torch.save` writes: what it says of itself."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_autoexport.errors import SourceError

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

    Refuses what is no whole archive, and what would take memory that no file of this size holds, before
    anything is unpickled. Raises SourceError.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records, size = archive.infolist(), path.stat().st_size
            _check_sizes(records, size, path, rank)
            # torch finds records by names in any case
            pickles = [r for r in records if r.filename.lower().endswith("data.pkl")]
            pickled = [os.pread(file.fileno(), r.file_size, _begin(file.fileno(), r)) for r in pickles[:1]]
            data = (r for r in records if "/data/" in r.filename)
            storages = {_begin(file.fileno(), r): Storage(r.file_size, r.CRC) for r in data}
    except SourceError:
        raise
    except Exception as e:  # zipfile raises what its parsers do: BadZipFile, OverflowError, UnicodeDecodeError …
        raise SourceError(f"{path} (rank {rank}): not a whole torch file: {e!r}. It is truncated or damaged.") from e
    if len(pickles) != 1:
        raise SourceError(f"{path} (rank {rank}): {len(pickles)} pickles in it, expected one; not a torch file.")
    if all(name in pickled[0] for name in _ALLOCATES):
        raise SourceError(
            f"{path} (rank {rank}): its pickle calls bytearray, which no shard needs and which "
            "`weights_only` lets take any amount of memory; this is not a file that training wrote."
        )
    return storages


def _check_sizes(records: Sequence[zipfile.ZipInfo], size: int, path: Path, rank: int) -> None:
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise SourceError(
                f"{path} (rank {rank}): {record.filename!r:.100} would unpack to {record.file_size} bytes; "
                "torch never packs its files, so this is not one that training wrote."
            )
        if record.filename.lower().endswith("data.pkl") and record.file_size > _MAX_PICKLE:
            raise SourceError(f"{path} (rank {rank}): more than {_MAX_PICKLE} bytes of names and shapes.")


def _begin(fd: int, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its name and an extra field, which here pads to an alignment."""
    lengths = os.pread(fd, 4, record.header_offset + 26)
    behind = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return record.header_offset + 30 + behind

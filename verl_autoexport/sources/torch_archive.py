"""The zip archive that `torch.save` writes: what it says of itself, and whether its bytes are still the same."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from verl_autoexport.errors import SourceError

_BLOCK = 1 << 20  # bytes read at a time
_MAX_PICKLE = 256 << 20  # bytes; names and shapes of a million tensors
_ALLOCATES = frozenset({"builtins bytearray", "__builtin__ bytearray"})
"""What `weights_only` lets a pickle call, and what then takes as much memory as the pickle asks for."""


def check_archive(path: Path, rank: int) -> None:
    """Refuse what would take memory that no file of this size holds, before anything is unpickled.

    Files that are no archive, or a damaged one, are left to torch's own message. Raises SourceError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                    raise SourceError(
                        f"{path} (rank {rank}): {record.filename!r:.100} would unpack to {record.file_size} bytes; "
                        "torch never packs its files, so this is not one that training wrote."
                    )
            pickles = [r for r in archive.infolist() if r.filename.endswith("data.pkl")]
            if any(r.file_size > _MAX_PICKLE for r in pickles):
                raise SourceError(f"{path} (rank {rank}): more than {_MAX_PICKLE} bytes of names and shapes.")
            called = set().union(*(_globals(archive.read(record)) for record in pickles))
    except SourceError:
        raise
    except Exception:  # noqa: BLE001 - torch reads it next and says what is wrong
        return
    if bad := called & _ALLOCATES:
        raise SourceError(
            f"{path} (rank {rank}): its pickle calls {', '.join(sorted(bad))}, which no shard needs and which "
            "`weights_only` lets take any amount of memory; this is not a file that training wrote."
        )


def _globals(pickled: bytes) -> set[str]:
    """Every `module name` that a pickle may call."""
    found, texts = set(), []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(argument))
        elif isinstance(argument, str):
            texts.append(argument)
        elif opcode.name == "STACK_GLOBAL":  # its module and name are texts that came before, however far
            found |= {f"{module} {name}" for module in {*texts} & {"builtins", "__builtin__"} for name in texts}
    return found


def read_sums(path: Path) -> dict[int, int]:
    """{first byte: CRC-32} of the storages in a file, from the zip directory."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as f:
        sums = {}
        for record in (r for r in archive.infolist() if "/data/" in r.filename):
            f.seek(record.header_offset + 26)  # lengths of name and extra field, which here pads to an alignment
            lengths = f.read(4)
            begin = record.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            sums[begin + int.from_bytes(lengths[2:], "little")] = record.CRC
        return sums


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

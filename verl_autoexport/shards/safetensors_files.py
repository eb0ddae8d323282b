"""A Hugging Face model directory as a source: the tensors of its safetensors files, from their headers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.manifest import ITEMSIZE, Shard, ShardManifest, TensorEntry
from verl_autoexport.system.untrusted import is_count, is_plain_name, parse_json, read_json

INDEX_NAME = "model.safetensors.index.json"
TORCH_DTYPE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""The name in a safetensors header → torch's dtype name."""
_MAX_HEADER = 100 << 20  # bytes; safetensors' own limit


def model_files(directory: Path) -> ShardManifest:
    """Every tensor of the model in `directory`, under its name on disk; raises SourceError naming the file."""
    files = weight_files(directory)
    if not files:
        raise SourceError(
            f"{directory}: no model.safetensors and no {INDEX_NAME}; expected a model in safetensors files."
        )
    found = manifest_of(files)
    if not found.tensors:
        raise SourceError(f"{directory}: its safetensors hold no tensors.")
    return found


def manifest_of(files: Sequence[Path], fingerprint: str = "") -> ShardManifest:
    """Every tensor in these files, whole and under its name there; raises SourceError naming the file."""
    tensors: dict[str, TensorEntry] = {}
    for number, path in enumerate(files):
        for name, dtype, shape, offset in _tensors(path):
            if name in tensors:
                raise SourceError(f"{path}: {name} is also in another file of {path.parent}.")
            tensors[name] = TensorEntry(
                name, dtype, shape, (Shard(0, (0,) * len(shape), shape, number, offset),)
            )  # fmt: skip
    return ShardManifest(tuple(files), tensors, 1, "safetensors", fingerprint)


def weight_files(directory: Path) -> list[Path]:
    """The weight files as transformers looks for them: one file first, then the index; none if both are missing."""
    if (single := directory / "model.safetensors").is_file():
        return [single]
    if not (index := directory / INDEX_NAME).is_file():
        return []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{index}: its weight_map cannot be read: {e!r}") from e
    if strange := [name for name in names if not is_plain_name(name)]:
        raise SourceError(f"{index}: weight_map names {strange[0]!r:.100}: expected files in {directory}.")
    return [directory / name for name in names]


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length in bytes of a safetensors file's JSON header, and the header; raises SourceError naming the file."""
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > min(_MAX_HEADER, path.stat().st_size):
                raise SourceError(f"{path}: a header of {length} bytes does not fit; not a whole safetensors file.")
            return length, parse_json(f.read(length), once=True)
    except (OSError, ValueError) as e:
        raise SourceError(f"{path}: not a readable safetensors file: {e}") from e


def _tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    length, header = read_header(path)
    try:
        size = path.stat().st_size
        header.pop("__metadata__", None)
        spans = []
        for name, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(map(is_count, (*shape, begin, end))) or not isinstance(dtype, str):
                raise SourceError(f"{path}: {name}: shape, offsets or dtype are invalid: {entry!r:.200}.")
            if 8 + length + end > size:
                raise SourceError(f"{path}: {name} ends beyond the file's {size} bytes; the file is truncated.")
            dtype = TORCH_DTYPE.get(dtype, dtype)
            if dtype in ITEMSIZE and end - begin != math.prod(shape) * ITEMSIZE[dtype]:
                raise SourceError(f"{path}: {name}: {dtype} {list(shape)} does not take {end - begin} bytes.")
            spans += [(begin, end)] if begin < end else []
            yield name, dtype, shape, 8 + length + begin
        spans.sort()
        if any(b > a for (_, b), (a, _) in pairwise(spans)):
            raise SourceError(f"{path}: its tensors overlap; not a whole safetensors file.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{path}: not a readable safetensors file: {e!r}") from e

"""Which bytes go where: manifest and names → files, headers and byte ranges.

Pure and torch-free. The layout is safetensors' (8 bytes of header length, little endian,
then JSON, padded with spaces to a multiple of 8, then the data), split into files as
`save_pretrained` splits them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.sources.base import ITEMSIZE, ShardManifest

SAFETENSORS_DTYPE = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch's dtype name → the name in a safetensors header."""
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Output:
    """A tensor on disk: its name, shape and dtype (torch's name without `torch.`).

    `swapped`: the last two dimensions are the other way round than transformers would write them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    swapped: bool = False


@dataclass(frozen=True)
class Group:
    """The outputs made of one source tensor.

    `convert` is False where the bytes are those of the source, cast only; True where
    transformers' reverse conversion must run on the whole source tensor.
    """

    fqn: str
    outputs: tuple[Output, ...]
    convert: bool


@dataclass(frozen=True)
class PlannedFile:
    """One output file: `header` bytes, then the groups' tensors one after the other."""

    name: str
    header: bytes
    groups: tuple[Group, ...]
    nbytes: int


@dataclass(frozen=True)
class MergePlan:
    """Everything that will be written; `index` is the sharded index, None for a single file."""

    files: tuple[PlannedFile, ...]
    index: Mapping[str, Any] | None
    num_parameters: int

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)

    @property
    def tensors(self) -> dict[str, Output]:
        return {o.name: o for f in self.files for g in f.groups for o in g.outputs}


def nbytes(output: Output) -> int:
    return math.prod(output.shape) * ITEMSIZE[output.dtype]


def make_plan(manifest: ShardManifest, groups: Sequence[Group], max_shard_size: int) -> MergePlan:
    """Split `groups` into files of at most `max_shard_size` bytes of data each.

    A group larger than that gets a file of its own. Raises PlanError when two groups claim
    one name, or a tensor's bytes do not match its source's.
    """
    _check(manifest, groups)
    bins: list[list[Group]] = [[]]
    room = max_shard_size
    for group in groups:
        size = sum(map(nbytes, group.outputs))
        if bins[-1] and size > room:
            bins.append([])
            room = max_shard_size
        bins[-1].append(group)
        room -= size
    names = ["model.safetensors"]
    if len(bins) > 1:
        names = [f"model-{i:05d}-of-{len(bins):05d}.safetensors" for i in range(1, len(bins) + 1)]
    files = tuple(_plan_file(name, groups) for name, groups in zip(names, bins, strict=True))
    numel = sum(math.prod(o.shape) for g in groups for o in g.outputs)
    index = _index(files, numel) if len(files) > 1 else None
    return MergePlan(files, index, numel)


def _check(manifest: ShardManifest, groups: Sequence[Group]) -> None:
    seen: dict[str, str] = {}
    for group in groups:
        source = manifest.tensors[group.fqn]
        for output in group.outputs:
            if output.name in seen:
                raise PlanError(f"{output.name} would be written twice: from {seen[output.name]} and {group.fqn}.")
            seen[output.name] = group.fqn
        made, have = sum(math.prod(o.shape) for o in group.outputs), math.prod(source.shape)
        if made != have:
            raise PlanError(f"{group.fqn}: {have} elements in the shards, {made} planned for {group.outputs}.")
    if not seen:
        raise PlanError("the shards hold no tensors at all.")


def _plan_file(name: str, groups: Sequence[Group]) -> PlannedFile:
    # Wider elements first keeps every tensor aligned to its own element size.
    groups = sorted(groups, key=lambda g: -max(ITEMSIZE[o.dtype] for o in g.outputs))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in (o for g in groups for o in g.outputs):
        end = position + nbytes(output)
        entries[output.name] = {
            "dtype": SAFETENSORS_DTYPE[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return PlannedFile(name, header, tuple(groups), len(header) + position)


def _index(files: Sequence[PlannedFile], numel: int) -> dict[str, Any]:
    weight_map = {o.name: f.name for f in files for g in f.groups for o in g.outputs}
    total = sum(f.nbytes - len(f.header) for f in files)
    return {
        "metadata": {"total_parameters": numel, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }

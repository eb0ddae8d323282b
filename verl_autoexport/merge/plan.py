"""The plan of a merge: manifest and names → files, headers and byte ranges.

Pure and torch-free. The layout is safetensors' (8 bytes of header length, little endian,
then JSON, padded with spaces to a multiple of 8, then the data), split into files as
`save_pretrained` splits them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.transforms import Transform
from verl_autoexport.shards.manifest import ITEMSIZE, ShardManifest
from verl_autoexport.shards.safetensors_files import TORCH_DTYPE
from verl_autoexport.shards.tiling import Box, Flaw, find_flaw

SAFETENSORS_DTYPE = {name: short for short, name in TORCH_DTYPE.items()}
"""torch's dtype name → the name in a safetensors header."""
_WORTH_A_FILE = 0.02  # of a model's bytes
_AS_IT_IS = {n: tuple(range(n)) for n in range(9)}
"""Number of dimensions → `Piece.dims` of a tensor that is written unchanged."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the source tensor `fqn`, and its place in an output tensor.

    `offsets` and `shape` are the box in the source, `at` is its first index in the output.
    `dims[i]` is the source dimension that the output's dimension i runs over, None a new
    one of size 1; the other source dimensions have size 1 in the box. `dims` itself is
    None if the whole source is only reshaped, which keeps its values in order.
    """

    fqn: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dims: tuple[int | None, ...] | None
    at: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether the output has the values in the order of the source box."""
        named = () if self.dims is None else tuple(d for d in self.dims if d is not None)
        return named == tuple(sorted(named))

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of the box in the output."""
        if self.dims is None or self.dims == _AS_IT_IS.get(len(self.shape)):
            return self.shape
        return tuple(1 if d is None else self.shape[d] for d in self.dims)


def whole(fqn: str, shape: tuple[int, ...]) -> tuple[Piece]:
    """The pieces of an output that is the unchanged source tensor `fqn` of `shape`."""
    zeros = (0,) * len(shape)
    return (Piece(fqn, zeros, shape, tuple(range(len(shape))), zeros),)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor on disk: its name, shape, dtype (torch's name without `torch.`), and its pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def swapped(self) -> Output:
        """The same output with its last two dimensions swapped."""

        def swap(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*values[:-2], values[-1], values[-2])

        pieces = []
        for piece in self.pieces:
            if piece.dims is None:
                raise PlanError(
                    f"{self.name}: reshaped and transposed at once on its way to disk; that is not supported."
                )
            pieces.append(replace(piece, dims=swap(piece.dims), at=swap(piece.at)))
        return replace(self, shape=swap(self.shape), pieces=tuple(pieces))


@dataclass(frozen=True)
class PlannedFile:
    """One output file: `header` bytes, then the tensors one after the other; `transforms` are by source tensor.

    `apart`: it holds only tensors that do not change between versions.
    """

    name: str
    header: bytes
    outputs: tuple[Output, ...]
    nbytes: int
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    apart: bool = False

    @property
    def sources(self) -> set[str]:
        """Every tensor of the manifest that the file needs."""
        read = {p.fqn for o in self.outputs for p in o.pieces}
        return read.union(*(t.sources for t in self.transforms.values()))


@dataclass(frozen=True)
class MergePlan:
    """All files that will be written; `index` is the sharded index, None for a single file."""

    files: tuple[PlannedFile, ...]
    index: Mapping[str, Any] | None
    num_parameters: int

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)

    @property
    def tensors(self) -> dict[str, Output]:
        return {o.name: o for f in self.files for o in f.outputs}


def nbytes(output: Output) -> int:
    return math.prod(output.shape) * ITEMSIZE[output.dtype]


def make_plan(
    manifest: ShardManifest,
    outputs: Sequence[Output],
    max_shard_size: int,
    transforms: Mapping[str, Transform] = MappingProxyType({}),
    apart: Collection[str] = (),
) -> MergePlan:
    """Splits `outputs` into files of at most `max_shard_size` bytes of data each; a larger tensor gets its own.

    The outputs in `apart` come first, in files of their own, which versions share on disk. Raises
    PlanError unless every element of every source tensor is written exactly once.
    """
    _check(manifest, outputs)
    groups = [[o for o in outputs if o.name in apart], [o for o in outputs if o.name not in apart]]
    if sum(map(nbytes, groups[0])) < _WORTH_A_FILE * sum(map(nbytes, outputs)):
        groups = [[], list(outputs)]
    bins = [(True, held) for held in _split(groups[0], max_shard_size)]
    bins += [(False, held) for held in _split(groups[1], max_shard_size)]
    names = ["model.safetensors"]
    if len(bins) > 1:
        names = [f"model-{i:05d}-of-{len(bins):05d}.safetensors" for i in range(1, len(bins) + 1)]
    files = tuple(_plan_file(name, held, transforms, kept) for name, (kept, held) in zip(names, bins, strict=True))
    numel = sum(math.prod(o.shape) for o in outputs)
    index = _index(files, numel) if len(files) > 1 else None
    return MergePlan(files, index, numel)


def _split(outputs: Sequence[Output], max_shard_size: int) -> list[list[Output]]:
    """The outputs of each file, divided by the function that `save_pretrained` calls."""
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {output.name: output for output in outputs}
    split = split_state_dict_into_shards_factory(
        by_name, get_storage_size=nbytes, filename_pattern="{suffix}", max_shard_size=max_shard_size
    )
    return [[by_name[name] for name in names] for names in split.filename_to_tensors.values() if names]


def one_file_plan(file: PlannedFile) -> MergePlan:
    """The plan of a directory with this one file of weights."""
    return MergePlan((file,), None, sum(math.prod(o.shape) for o in file.outputs))


def plan_one(manifest: ShardManifest, outputs: Sequence[Output], name: str) -> PlannedFile:
    """A file `name` with all `outputs`; raises PlanError as `make_plan` does."""
    _check(manifest, outputs)
    return _plan_file(name, outputs, {}, False)


def _check(manifest: ShardManifest, outputs: Sequence[Output]) -> None:
    """Checks that every element of an output has one source, and every element of a source goes to one place.

    The manifest has already checked that the shards tile the sources.
    """
    if not outputs:
        raise PlanError("the shards hold no tensors at all.")
    names = Counter(o.name for o in outputs)
    if twice := [name for name, times in names.items() if times > 1]:
        raise PlanError(f"{twice[0]} would be written twice ({len(twice)} such names).")
    used: dict[str, list[Box]] = {}
    for output in outputs:
        made = [(p.at, p.extent) for p in output.pieces if p.dims is not None]
        if made and (flaw := find_flaw(made, output.shape)):
            raise PlanError(f"{output.name} {list(output.shape)}: {_explain(flaw, made)}.")
        for piece in output.pieces:
            if piece.dims is None and (len(output.pieces), math.prod(piece.shape)) != (1, math.prod(output.shape)):
                raise PlanError(f"{output.name}: {list(piece.shape)} cannot be reshaped to {list(output.shape)}.")
            used.setdefault(piece.fqn, []).append((piece.offsets, piece.shape))
    for fqn, read in used.items():
        shape = manifest.tensors[fqn].shape
        if flaw := find_flaw(read, shape):
            raise PlanError(f"{fqn}: {list(shape)} in the shards, but for the output {_explain(flaw, read)}.")


def _explain(flaw: Flaw, boxes: Sequence[Box]) -> str:
    if flaw.kind == "volume":
        return f"{flaw.found} elements are planned"
    which = " and ".join(f"{list(boxes[i][1])} at {list(boxes[i][0])}" for i in flaw.boxes)
    return f"{which} lies outside" if flaw.kind == "outside" else f"{which} overlap"


def _plan_file(name: str, outputs: Sequence[Output], transforms: Mapping[str, Transform], apart: bool) -> PlannedFile:
    # Wider elements first keeps every tensor aligned to its own element size.
    outputs = sorted(outputs, key=lambda o: -ITEMSIZE[o.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in outputs:
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
    needed = {p.fqn: transforms[p.fqn] for o in outputs for p in o.pieces if p.fqn in transforms}
    return PlannedFile(name, header, tuple(outputs), len(header) + position, needed, apart)


def _index(files: Sequence[PlannedFile], numel: int) -> dict[str, Any]:
    weight_map = {o.name: f.name for f in files for o in f.outputs}
    total = sum(f.nbytes - len(f.header) for f in files)
    return {
        "metadata": {"total_parameters": numel, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }

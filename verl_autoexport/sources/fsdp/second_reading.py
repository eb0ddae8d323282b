"""Rank files read for verification: torch itself unpickles them, and `torch.chunk` gives each shard's place.

Files of another torch version that this one cannot load are mapped, and read as the merge reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.manifest import ITEMSIZE
from verl_autoexport.sources.fsdp.discovery import rank_files
from verl_autoexport.sources.fsdp.rank_files import RankFile
from verl_autoexport.sources.fsdp.rank_state import Parts, Placement, read_tensor
from verl_autoexport.sources.protocol import Leaf, SecondReading


@dataclass(frozen=True)
class Part:
    """One rank's part of a tensor; `mesh` is None for a plain one."""

    values: torch.Tensor
    mesh: torch.Tensor | None = None
    placements: tuple[Placement, ...] = ()


def read_again(directory: Path) -> SecondReading:
    """Reads a checkpoint; raises SourceError for missing rank files, Refused for one that holds more than tensors."""
    ranks, mapped = _rank_files(directory)
    return SecondReading(
        {name: partial(_place, [rank[name] for rank in ranks]) for name in ranks[0]},
        {name: part.values.dtype for name, part in ranks[0].items()},
        f"mapped, for torch {torch.__version__} cannot load them" if mapped else "",
    )


def _rank_files(shards: Path) -> tuple[list[dict[str, Part]], bool]:
    """The parts in each rank's file; and whether torch, perhaps not the version that wrote them, failed to load one."""
    ranks, mapped = [], False
    for rank, path in enumerate(rank_files(shards)):
        file = RankFile(path, rank)
        records = file.state()  # before torch loads it: raises for anything but tensors
        try:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            ranks.append({name: _loaded(tensor) for name, tensor in state.items()})
        except Exception:  # noqa: BLE001 - this torch's objects have other attributes, in whatever way
            content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            ranks.append({name: _mapped(file, content, name, record) for name, record in records.items()})
            mapped = True
    return ranks, mapped


def _loaded(tensor: torch.Tensor) -> Part:
    if not isinstance(tensor, DTensor):
        return Part(tensor)
    placements = tuple(
        p.dim if isinstance(p, Shard) else None if isinstance(p, Replicate) else str(p) for p in tensor.placements
    )
    return Part(tensor._local_tensor, tensor.device_mesh.mesh, placements)


def _mapped(file: RankFile, content: torch.Tensor, name: str, record: Any) -> Part:
    tensor = read_tensor(record)
    local = tensor.local if isinstance(tensor, Parts) else tensor
    begin, nbytes, _ = file.find(name, local)
    part = content[begin : begin + nbytes]
    part = part.clone() if begin % ITEMSIZE[local.dtype] else part
    values = part.view(getattr(torch, local.dtype)).view(local.shape)
    if not isinstance(tensor, Parts):
        return Part(values)
    mesh = file.mesh(name, tensor.mesh)
    return Part(values, torch.tensor(mesh.ranks).view(mesh.shape), tensor.placements)


def _place(parts: Sequence[Part], target: torch.Tensor, leaf: Leaf) -> None:
    """Calls `leaf` for the place of each rank's part in `target`; mesh dimensions split one after the other."""
    placements, whole = parts[0].placements, parts[0].mesh
    if whole is None:
        leaf(target, parts[0].values)
        return

    def split(view: torch.Tensor, mesh: torch.Tensor, depth: int) -> None:
        if mesh.ndim == 0:
            leaf(view, parts[int(mesh)].values)
        elif (placement := placements[depth]) is None:
            split(view, mesh[0], depth + 1)
        elif isinstance(placement, int):
            for part, rest in zip(view.chunk(len(mesh), placement), mesh, strict=False):
                split(part, rest, depth + 1)
        else:
            raise SourceError(f"placement {placement} is not supported; expected Shard(dim) or Replicate().")

    split(target, whole, 0)

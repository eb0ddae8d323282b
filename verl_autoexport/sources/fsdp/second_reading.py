"""Rank files read for verification: torch itself unpickles them, and `torch.chunk` gives each shard's place.

The installed torch and the one that wrote the files may be of different versions. So a class that the installed one
lacks gets an inert stand-in, and only the stored values of a device mesh are used, none of its properties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.utils._pytree import tree_leaves

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp.discovery import rank_files
from verl_autoexport.sources.fsdp.rank_files import RankFile
from verl_autoexport.sources.protocol import Leaf, SecondReading


class _Inert:
    """An object of a class that the installed torch lacks: its attributes, and no behaviour."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)


def read_again(directory: Path) -> SecondReading:
    """Reads a checkpoint; raises SourceError for missing rank files, Refused for one that holds more than tensors."""
    ranks = [_load(path, rank) for rank, path in enumerate(rank_files(directory))]
    return SecondReading(
        {name: partial(_place, [rank[name] for rank in ranks]) for name in ranks[0]},
        {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in ranks[0].items()},
    )


def _load(path: Path, rank: int) -> dict[str, torch.Tensor]:
    RankFile(path, rank).state()  # before torch loads it: raises for anything but tensors
    try:
        with safe_globals([_stand_in(name) for name in get_unsafe_globals_in_checkpoint(path)]):
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as e:
        raise SourceError(
            f"{path} (rank {rank}): torch {torch.__version__} cannot load it for verification: {e!r:.300}. Use the "
            "torch that saved it."
        ) from e


def _stand_in(name: str) -> tuple[type, str]:
    """The class that torch uses for the global `name`; up to torch 2.4 a DTensor has another name."""
    leaf = name.rpartition(".")[2]
    return (DTensor if leaf == "DTensor" else type(leaf, (_Inert,), {})), name


def _ranks(mesh: Any) -> torch.Tensor:
    """The ranks of a device mesh: stored up to torch 2.9, later laid out in the map of all ranks."""
    held = vars(mesh)
    if "mesh" in held:
        return held["mesh"]
    layout = vars(held["_layout"])
    if "axes" in layout:
        dims = [(vars(axis)["shape"], vars(axis)["stride"]) for axis in layout["axes"]]
    elif isinstance(layout["shape"], tuple):
        dims = list(zip(layout["shape"], layout["stride"], strict=True))
    else:
        dims = [(layout["shape"], layout["stride"])]
    sizes, strides = ([n for dim in dims for n in tree_leaves(dim[i])] for i in (0, 1))
    return held["_rank_map"].as_strided(sizes, strides).reshape([math.prod(tree_leaves(size)) for size, _ in dims])


def _place(parts: Sequence[torch.Tensor], target: torch.Tensor, leaf: Leaf) -> None:
    """Calls `leaf` for the place of each rank's part in `target`; mesh dimensions split one after the other."""
    whole, *_ = parts
    if not isinstance(whole, DTensor):
        leaf(target, whole)
        return

    def split(view: torch.Tensor, mesh: torch.Tensor, depth: int) -> None:
        if mesh.ndim == 0:
            part: Any = parts[int(mesh)]
            leaf(view, part._local_tensor)
            return
        placement: Any = whole._spec.placements[depth]
        if (kind := type(placement).__name__) == "Replicate":
            split(view, mesh[0], depth + 1)
        elif kind == "Shard":
            for part, rest in zip(view.chunk(len(mesh), placement.dim), mesh, strict=False):
                split(part, rest, depth + 1)
        else:
            raise SourceError(f"placement {placement} is not supported; expected Shard(dim) or Replicate().")

    split(target, _ranks(whole._spec.mesh), 0)

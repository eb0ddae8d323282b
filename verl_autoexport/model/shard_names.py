"""Names in shards → names in memory, where they differ: transformers 4 had other names for some, or those on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from verl_autoexport.merge.plan import Output, Piece, whole
from verl_autoexport.model.conversion import reverse
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.model.trace import trace
from verl_autoexport.shards.manifest import Shard, ShardManifest, TensorEntry, check_coverage


def by_memory(skeleton: Skeleton, manifest: ShardManifest) -> ShardManifest:
    """The manifest by names in memory, for names that the skeleton knows; others stay as they are.

    The parts of a tensor that the model has packed in memory, such as experts, become shards of it.
    """
    state = skeleton.tensors
    unknown = sorted(manifest.tensors.keys() - state.keys())
    if not unknown:
        return manifest
    on_disk = _outputs(skeleton)
    found: dict[str, dict[str, Piece]] = {}
    for name in unknown:
        fqn, pattern = skeleton.place(name)
        shape = tuple(state[fqn].shape) if fqn in state else ()
        output = on_disk.get(name) if pattern else Output(name, shape, "", whole(fqn, shape))
        if output and output.shape == manifest.tensors[name].shape and _is_box(output):
            found.setdefault(output.pieces[0].fqn, {})[name] = output.pieces[0]
    tensors = dict(manifest.tensors)
    for fqn, parts in found.items():
        if fqn in state and fqn not in tensors:
            entry = _joined(fqn, tuple(state[fqn].shape), parts, manifest.tensors)
            tensors |= {} if entry is None else {fqn: entry}
            for name in parts if entry else ():
                del tensors[name]
    return replace(manifest, tensors=tensors)


def _outputs(skeleton: Skeleton) -> dict[str, Output]:
    metas = {name: torch.empty_like(tensor, device="meta") for name, tensor in skeleton.tensors.items()}
    return {output.name: output for output in trace(partial(reverse, skeleton), metas)}


def _is_box(output: Output) -> bool:
    """Whether the values are those of a box of one tensor in memory, in their order there."""
    piece, *more = output.pieces
    return not more and piece.dims is not None and piece.in_order


def _joined(
    fqn: str, shape: tuple[int, ...], parts: Mapping[str, Piece], tensors: Mapping[str, TensorEntry]
) -> TensorEntry | None:
    """The tensor in memory with these parts; None if they are not all of it, or of different dtypes."""
    entries = [tensors[name] for name in parts]
    if len({entry.dtype for entry in entries}) > 1 or sum(math.prod(e.shape) for e in entries) != math.prod(shape):
        return None
    shards = [_placed(shard, piece) for name, piece in parts.items() for shard in tensors[name].shards]
    entry = replace(entries[0], fqn=fqn, shape=shape, shards=tuple(shards))
    check_coverage(entry)
    return entry


def _placed(shard: Shard, piece: Piece) -> Shard:
    """The shard of a tensor on disk as one of the tensor in memory."""
    offsets, shape, dim = list(piece.offsets), [1] * len(piece.shape), 0
    for i, source in enumerate(piece.dims or ()):
        if source is not None:
            offsets[source] += shard.offsets[i]
            shape[source] = shard.shape[i]
            dim = source if i == shard.dim else dim
    return replace(shard, offsets=tuple(offsets), shape=tuple(shape), dim=dim)

"""Names in shards → names in memory, where they differ: those of transformers 4, or those of a saved model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import Output, Piece, whole
from verl_autoexport.model.base_model import brief
from verl_autoexport.model.conversion import class_outputs, name_outputs, read_as, reverse
from verl_autoexport.model.dtypes import disk_dtype
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.model.trace import trace
from verl_autoexport.shards.manifest import Shard, ShardManifest, TensorEntry, check_coverage


def whole_model(skeleton: Skeleton, manifest: ShardManifest, dtype: str) -> tuple[ShardManifest, list[Output]]:
    """The manifest by the names that the outputs are made of, and the outputs; PlanError unless it is the whole model.

    The tensors of a saved model are given names in memory, too, and come out as they were. Where that is impossible,
    as for tensors that transformers transposes or joins, they are taken as they are.
    """
    if not manifest.on_disk:
        held = by_memory(skeleton, manifest)
        return held, name_outputs(skeleton, held, dtype)
    manifest = _without_unread(skeleton, manifest)
    saved = {output.name: output for output in class_outputs(skeleton)}
    turned = {name for name, o in saved.items() if name in skeleton.tensors and o.pieces != whole(name, o.shape)}
    found = {name: entry.shape for name, entry in manifest.tensors.items()}
    try:
        if turned := sorted(turned & found.keys()):
            raise PlanError(f"{brief(turned)}: {skeleton.name} has them on disk otherwise than in memory.")
        held = replace(by_memory(skeleton, manifest), on_disk=False)
        return held, name_outputs(skeleton, held, dtype)
    except PlanError as e:
        if found == {name: output.shape for name, output in saved.items()}:
            return manifest, [_as_it_is(skeleton, output, manifest, dtype) for output in saved.values()]
        missing, strange = sorted(saved.keys() - found.keys()), sorted(found.keys() - saved.keys())
        if not missing and not strange:
            raise
        raise PlanError(
            f"{e} Of the names that it has on disk, {brief(missing) or 'none'} are missing; {brief(strange) or 'none'} "
            "are unknown."
        ) from e


def _without_unread(skeleton: Skeleton, manifest: ShardManifest) -> ShardManifest:
    """The manifest without tensors that the class does not read by its own rules, such as multi-token prediction."""
    unread = [name for name in manifest.tensors if read_as(skeleton, name) is None and skeleton.optional(name)]
    if not unread:
        return manifest
    note = f"left out, since {skeleton.name} does not read them: {brief(unread)}"
    tensors = {name: entry for name, entry in manifest.tensors.items() if name not in set(unread)}
    return replace(manifest, tensors=tensors, notes=(*manifest.notes, note))


def _as_it_is(skeleton: Skeleton, output: Output, manifest: ShardManifest, dtype: str) -> Output:
    held = manifest.tensors[output.name].value_dtype
    cast = disk_dtype(skeleton, output.pieces[0].fqn, held, dtype)
    return Output(output.name, output.shape, cast, whole(output.name, output.shape))


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

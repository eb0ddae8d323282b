"""The loaded model against the shards, by a path that shares nothing with the merge.

torch itself unpickles the rank files (those that another torch wrote and this one cannot read
are mapped and read as the merge does), `torch.chunk` says where each shard belongs, PEFT itself
merges LoRA. Every tensor must be equal in bits, and the logits of both must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from verl_autoexport.model.base_model import counts_predicting
from verl_autoexport.model.config_json import differences, plain
from verl_autoexport.model.skeleton import load_config
from verl_autoexport.shards.manifest import ITEMSIZE
from verl_autoexport.sources.fsdp.discovery import rank_files
from verl_autoexport.sources.fsdp.rank_files import RankFile
from verl_autoexport.sources.fsdp.rank_state import Parts, Placement, read_tensor

_OF_A_HEAD = {"architectures", "num_labels", "id2label", "label2id"}  # verl's config.json does not know a value head
Leaf = Callable[[torch.Tensor, torch.Tensor], None]
"""Told, for one shard, of its place in a tensor and its values."""
Visit = Callable[[torch.Tensor, Leaf], None]
"""Calls a Leaf for every shard of one tensor, given the tensor that they fill."""


@dataclass(frozen=True)
class Part:
    """One rank's part of a tensor; `mesh` is None for a plain one."""

    values: torch.Tensor
    mesh: torch.Tensor | None = None
    placements: tuple[Placement, ...] = ()


def compare(
    model: Any,
    shards: Path,
    saved: Path,
    lora: Mapping[str, Any] | None = None,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Give `model` the weights in `shards` and return what was found equal; ValueError names what differs.

    `saved` has the run's `config.json`. `lora`: the configuration of the adapter in the shards, `base` the
    directory of its base model where the shards hold the adapter only.
    """
    trained = load_config(saved, trust_remote_code)
    found = set(differences(plain(model.config.to_dict()), plain(trained.to_dict()))) - _OF_A_HEAD
    if keys := {key for key in found if not counts_predicting(key)}:
        raise ValueError(f"config.json differs from the trained model's in {sorted(keys)[:8]}")
    with torch.inference_mode():
        try:
            before = forward(model)
        except CannotRun:
            before = None
        ranks, mapped = _rank_files(shards)
        count = _replace(model, ranks, lora, base)
        equal = f"all {count} tensors equal those of the shards" + (" merged by PEFT" if lora else "")
        equal += f" (mapped, for torch {torch.__version__} cannot load them)" if mapped else ""
        if before is None:
            return f"{equal}; no logits, since the model does not run on token ids alone here"
        after = forward(model)
    if not torch.equal(before, after):
        raise ValueError(f"the logits differ from those of the shards by up to {(before - after).abs().max().item():g}")
    return f"{equal}, and so do the logits on {before.shape[1]} tokens"


class CannotRun(Exception):
    """transformers cannot run the model on a CPU with token ids alone: it wants images, or a kernel of a GPU."""


def fixed_input(model: Any) -> torch.Tensor:
    """Eight token ids, shape (1, 8)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, 9).remainder(vocabulary)[None]


def forward(model: Any) -> torch.Tensor:
    """Logits of the fixed input, shape (1, 8, vocabulary or labels); a decoder of its own begins with the same.

    Raises CannotRun with the reason of the model's own code.
    """
    try:
        ids = fixed_input(model)
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **extra).logits
    except Exception as e:
        raise CannotRun(f"{type(e).__name__}: {e}") from e


def _rank_files(shards: Path) -> tuple[list[dict[str, Part]], bool]:
    """The parts in each rank's file; and whether torch, which may be another than wrote them, could not load one."""
    ranks, mapped = [], False
    for rank, path in enumerate(rank_files(shards)):
        file = RankFile(path, rank)
        records = file.state()  # before torch sees it: raises for what is more than tensors
        try:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            ranks.append({name: _loaded(tensor) for name, tensor in state.items()})
        except Exception:  # noqa: BLE001 - an object's attributes are not as this torch has them, whichever way
            content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            ranks.append({name: _mapped(file, content, name, record) for name, record in records.items()})
            mapped = True
    return ranks, mapped


def _loaded(tensor: torch.Tensor) -> Part:
    if not isinstance(tensor, DTensor):
        return Part(tensor)
    placements = tuple(None if isinstance(p, Replicate) else p.dim for p in tensor.placements)
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


def _replace(model: Any, ranks: Sequence[Mapping[str, Part]], lora: Mapping[str, Any] | None, base: Path | None) -> int:
    """Write the trained values over those of `model`, comparing them; returns how many tensors there were."""
    source = _plain(ranks) if lora is None else _merged(model, ranks, lora, base)
    mine = model.state_dict()
    unsaved = set(model._keys_to_ignore_on_save or ())
    differ, seen = set(), set()

    def put(name: str, place: torch.Tensor, values: torch.Tensor) -> None:
        values = values.to(place.dtype)
        if not torch.equal(_bits(place), _bits(values)):
            differ.add(name)
        place.copy_(values)

    for name, visit in source:
        if name not in unsaved:
            visit(mine[name], partial(put, name))
        seen.add(mine[name].data_ptr())
    if lost := [name for name, t in mine.items() if t.numel() and t.data_ptr() not in seen]:
        raise ValueError(f"not in the shards: {lost[:8]}")
    if differ:
        raise ValueError(f"{len(differ)} tensors differ from the shards: {sorted(differ)[:8]}")
    return len(mine)


def _plain(ranks: Sequence[Mapping[str, Part]]) -> Iterator[tuple[str, Visit]]:
    for name in ranks[0]:
        yield name, partial(_place, [r[name] for r in ranks])


def _place(parts: Sequence[Part], target: torch.Tensor, leaf: Leaf) -> None:
    """Call `leaf` for the place of each rank's part in `target`; mesh dimensions split one after the other."""
    placements, whole = parts[0].placements, parts[0].mesh
    if whole is None:
        leaf(target, parts[0].values)
        return

    def split(view: torch.Tensor, mesh: torch.Tensor, depth: int) -> None:
        if mesh.ndim == 0:
            leaf(view, parts[int(mesh)].values)
        elif placements[depth] is None:
            split(view, mesh[0], depth + 1)
        else:
            for part, rest in zip(view.chunk(len(mesh), placements[depth]), mesh, strict=False):
                split(part, rest, depth + 1)

    split(target, whole, 0)


def _merged(
    model: Any, ranks: Sequence[Mapping[str, Part]], lora: Mapping[str, Any], base: Path | None
) -> Iterator[tuple[str, Visit]]:
    """The same of what PEFT's `merge_and_unload` makes of the adapter, in the dtype of training."""
    from peft import LoraConfig, get_peft_model

    dtype = next(v.values.dtype for k, v in ranks[0].items() if ".lora_" in k)
    if base is None:
        with torch.device("meta"):
            trained = type(model)._from_config(deepcopy(model.config), dtype=dtype)
        trained = trained.to_empty(device="cpu")
    else:
        trained = type(model).from_pretrained(base, dtype=dtype, local_files_only=True)
    wrapped = get_peft_model(trained, LoraConfig(**lora), autocast_adapter_dtype=False)
    state = wrapped.state_dict()
    for name, visit in _plain(ranks):
        visit(state[name], lambda mine, theirs: mine.copy_(theirs))
    for name, tensor in wrapped.merge_and_unload().state_dict().items():
        yield name, partial(_place, [Part(tensor)])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor

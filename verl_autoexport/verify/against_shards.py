"""The loaded model against the shards, read again by a path that shares nothing with the merge.

PEFT itself merges LoRA. Every tensor must be equal in bits, and the logits of both must be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verl_autoexport.model.base_model import counts_predicting
from verl_autoexport.model.config_json import differences, plain
from verl_autoexport.model.transformers_api import build, load
from verl_autoexport.sources.formats import format_of
from verl_autoexport.sources.protocol import Leaf, SecondReading, Visit

_OF_A_HEAD = {"architectures", "num_labels", "id2label", "label2id"}  # a value head is missing in verl's config.json


def compare(
    model: Any, shards: Path, trained: Any, lora: Mapping[str, Any] | None = None, base: Path | None = None
) -> str:
    """Gives `model` the weights in `shards` and returns a line about the equal parts; ValueError names differences.

    `trained` is the run's configuration. `lora` is the configuration of the adapter in the shards, `base` the
    directory of its base model if the shards have only the adapter.
    """
    found = set(differences(plain(model.config.to_dict()), plain(trained.to_dict()))) - _OF_A_HEAD
    if keys := {key for key in found if not counts_predicting(key)}:
        raise ValueError(f"config.json differs from the trained model's in {sorted(keys)[:8]}")
    with torch.inference_mode():
        try:
            before = forward(model)
        except CannotRun:
            before = None
        shards_again = format_of(shards).read_again(shards)
        count = _replace(model, shards_again, lora, base)
        equal = f"all {count} tensors equal those of the shards" + (" merged by PEFT" if lora else "")
        if before is None:
            return f"{equal}; no logits, since the model does not run on token ids alone here"
        after = forward(model)
    if not torch.equal(before, after):
        raise ValueError(f"the logits differ from those of the shards by up to {(before - after).abs().max().item():g}")
    return f"{equal}, and so do the logits on {before.shape[1]} tokens"


class CannotRun(Exception):
    """transformers cannot run the model on a CPU with token ids alone: it needs images, or a GPU kernel."""


def fixed_input(model: Any) -> torch.Tensor:
    """Eight token ids, shape (1, 8)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, 9).remainder(vocabulary)[None]


def forward(model: Any) -> torch.Tensor:
    """The logits of the fixed input, shape (1, 8, vocabulary or labels); a separate decoder starts with the same ids.

    Raises CannotRun with the reason that the model's own code gives.
    """
    try:
        ids = fixed_input(model)
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **extra).logits
    except Exception as e:
        raise CannotRun(f"{type(e).__name__}: {e}") from e


def _replace(model: Any, shards: SecondReading, lora: Mapping[str, Any] | None, base: Path | None) -> int:
    """Replaces the values of `model` by the trained ones, after a comparison; returns the number of tensors."""
    mine = model.state_dict()
    if lora is not None:
        source = _merged(model, shards, lora, base)
    else:
        source = shards.tensors.items() if shards.tensors.keys() <= mine.keys() else _loaded(model, shards)
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


def _loaded(model: Any, shards: SecondReading) -> Iterator[tuple[str, Visit]]:
    """The tensors of shards with other names than those in memory, loaded by transformers itself."""
    state = {name: torch.empty_like(shards.empty[name], device="cpu") for name in shards.tensors}
    for name, visit in shards.tensors.items():
        visit(state[name], lambda place, values: place.copy_(values))
    options = {"config": deepcopy(model.config), "state_dict": state, "output_loading_info": True}
    loaded, report = load(type(model), None, torch.float32, **options)  # it holds the values of every smaller dtype
    if wrong := {key: sorted(names)[:8] for key, names in report.items() if names}:
        raise ValueError(f"transformers does not read the shards as this model: {wrong}")
    for name, tensor in loaded.state_dict().items():
        yield name, partial(_whole, tensor)


def _merged(
    model: Any, shards: SecondReading, lora: Mapping[str, Any], base: Path | None
) -> Iterator[tuple[str, Visit]]:
    """The tensors after PEFT's `merge_and_unload`, in the dtype of training."""
    from peft import LoraConfig, get_peft_model

    dtype = next(tensor.dtype for name, tensor in shards.empty.items() if ".lora_" in name)
    if base is None:
        trained = build(type(model), deepcopy(model.config), dtype).to_empty(device="cpu")
    else:
        trained = load(type(model), base, dtype)
    wrapped = get_peft_model(trained, LoraConfig(**lora), autocast_adapter_dtype=False)
    state = wrapped.state_dict()
    for name, visit in shards.tensors.items():
        visit(state[name], lambda mine, theirs: mine.copy_(theirs))
    for name, tensor in wrapped.merge_and_unload().state_dict().items():
        yield name, partial(_whole, tensor)


def _whole(tensor: torch.Tensor, target: torch.Tensor, leaf: Leaf) -> None:
    leaf(target, tensor)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor

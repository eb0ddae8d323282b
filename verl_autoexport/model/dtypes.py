"""The dtype of each tensor on disk: the one that `from_pretrained(dtype=…)` would give it."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from verl_autoexport.shards.manifest import FLOATING, ShardManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_DTYPES = ("source", "base")
"""The export dtypes with which each tensor has its own dtype."""


def model_dtype(skeleton: PreTrainedModel, manifest: ShardManifest, dtype: str) -> str:
    """transformers' dtype of the model exported in `dtype`: that of its first floating parameter."""
    rule = DtypeRule(skeleton, dtype)
    held = (
        (name, manifest.tensors[name].value_dtype)
        for name, _ in skeleton.named_parameters()
        if name in manifest.tensors
    )
    return next(rule(name, source) for name, source in held if source in FLOATING)


class DtypeRule:
    """Output dtype of a tensor by its in-memory name, as `from_pretrained(dtype=…)` would load it.

    `skeleton` must have been built in `dtype`: a tensor that a class creates in another dtype keeps that.
    """

    def __init__(self, skeleton: PreTrainedModel, dtype: str) -> None:
        self.dtype = dtype
        self.fp32: re.Pattern[str] | None = None
        self.built: dict[str, str] = {}
        if dtype in OWN_DTYPES:
            return
        self.built = {k: str(v.dtype).removeprefix("torch.") for k, v in skeleton.state_dict().items()}
        if plan := skeleton._get_dtype_plan(getattr(torch, dtype)):
            from transformers.core_model_loading import build_glob_alternation

            self.fp32 = build_glob_alternation(list(plan))[0]

    def __call__(self, fqn: str, source: str) -> str:
        if source not in FLOATING or self.dtype in OWN_DTYPES:
            return source
        if self.fp32 and self.fp32.search(fqn):
            return "float32"
        built = self.built.get(fqn, self.dtype)
        return built if built in FLOATING else self.dtype


def in_dtype(skeleton: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The skeleton as if it had been built in `dtype`."""
    config = deepcopy(skeleton.config)
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        return type(skeleton)._from_config(config, dtype=config.dtype, attn_implementation="eager")

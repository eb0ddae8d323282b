"""transformers 5's own machinery, as far as the package needs it; no other module touches it.

Other versions convert names, tie weights and spell a dtype otherwise, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of `cls` on the meta device, in `dtype`; with None, in that of `config`."""
    kwargs: dict[str, Any] = {"attn_implementation": "eager"}
    if dtype is not None:
        set_dtype(config, dtype)  # some classes read the config's dtype
        kwargs["dtype"] = dtype
    with torch.device("meta"):
        return cls._from_config(config, **kwargs)


def load(cls: type[PreTrainedModel], directory: Path | None, dtype: Any, **options: Any) -> Any:
    """The result of `from_pretrained`, without a network; `dtype` may be `auto`, `directory` None."""
    return cls.from_pretrained(directory, dtype=dtype, local_files_only=True, **options)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model, if it is in `dtype`; otherwise another one on the meta device, built in it."""
    return model if model.config.dtype == dtype else build(type(model), deepcopy(model.config), dtype)


def set_dtype(config: PretrainedConfig, dtype: torch.dtype | str) -> None:
    """Sets the dtype of a configuration, but not that of nested ones. In place."""
    config.dtype = dtype


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """{alias: the name it is tied to}, both in memory."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """A pattern of the names in memory that stay in float32 when the model is loaded in `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return None
    from transformers.core_model_loading import build_glob_alternation

    return build_glob_alternation(list(plan))[0]


def natural_key(name: str) -> Any:
    """The key of the order in which transformers writes tensors, and stacks the parts of one."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)


def to_disk(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The conversion of `save_pretrained`: packed experts are unpacked, prefixes renamed back."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


class Loading:
    """The places where `from_pretrained` puts tensors, by their name in files; nothing is loaded.

    A name in files may lack the base model's prefix, have one too many, or be an older
    class's name; transformers renames all these, so its own rules answer here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model)
        self.converters = [t for t in mapping if isinstance(t, WeightConverter)]
        self.renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        self.state = model.state_dict()
        self.prefix = model.base_model_prefix
        self.rename = rename_source_key

    def place(self, name: str) -> tuple[str, str | None]:
        """The in-memory name of a tensor, and its pattern if it is part of a conversion."""
        found = self.rename(name, self.renamings, self.converters, self.prefix, self.state)
        if found[0] not in self.state and name in self.state:
            found = self.rename(name, [], [], self.prefix, self.state)
        return found

    def unexpected(self, name: str) -> set[str]:
        """The names in transformers' report for a tensor that the class does not read."""
        found, pattern = self.place(name)
        converter = next((c for c in self.converters if pattern in c.source_patterns), None)
        targets = converter.target_patterns if converter else []
        return {found, *(found.replace(targets[0], target) for target in targets)}

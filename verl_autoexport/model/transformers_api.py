"""transformers' own machinery, as far as the package needs it, of versions 4 and 5; no other module touches it.

transformers 5 converts names and tensors by rules that can be asked for. In transformers 4 names
on disk are those in memory, but for the prefixes of some classes, and aliases are known by
the parameter that they share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TESTED = (((4, 51), (4, 57)), ((5, 0), (5, 10)))
"""The first and the last release of each range that was tested; README.md and docs/failures.md say how far."""
_HALF = (torch.float16, torch.bfloat16)


def build(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of `cls` on the meta device, in `dtype`; with None, in that of `config`."""
    kwargs: dict[str, Any] = {"attn_implementation": "eager"}
    if dtype is not None:
        set_dtype(config, dtype)  # some classes read the config's dtype
        kwargs[_dtype_key()] = dtype
        if not _converts():  # else `_from_config` does so
            for nested in (getattr(config, key, None) for key in config.sub_configs):
                if nested is not None:
                    set_dtype(nested, dtype)
    with torch.device("meta"):
        return cls._from_config(config, **kwargs)


def load(cls: type[PreTrainedModel], directory: Path | None, dtype: Any, **options: Any) -> Any:
    """The result of `from_pretrained`, without a network; `dtype` may be `auto`, `directory` None."""
    return cls.from_pretrained(directory, local_files_only=True, **{_dtype_key(): dtype}, **options)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model, if it is in `dtype`; otherwise another one on the meta device, built in it."""
    return model if getattr(model.config, _dtype_key()) == dtype else build(type(model), deepcopy(model.config), dtype)


def set_dtype(config: PretrainedConfig, dtype: torch.dtype | str) -> None:
    """Sets the dtype of a configuration, but not that of nested ones. In place."""
    setattr(config, _dtype_key(), dtype)


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """{alias: the name it is tied to}, both in memory."""
    if _converts():
        return getattr(model, "all_tied_weights_keys", None) or {}
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    dropped, found = _modeling()._get_tied_weight_keys(model), {}
    for names in shared.values():
        kept = next((k for k in names if not any(re.search(pattern, k) for pattern in dropped)), max(names))
        found |= {name: kept for name in names if name != kept}
    return found


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """A pattern of the names in memory that stay in float32 when the model is loaded in `dtype`."""
    if not hasattr(model, "_get_dtype_plan"):  # up to 5.0
        names = (getattr(model, "_keep_in_fp32_modules_strict", None) or []) if dtype in _HALF else []
        names = [*names, *((model._keep_in_fp32_modules or []) if dtype == torch.float16 else [])]
        return re.compile("|".join(rf"((^|\.){name}($|\.))" for name in names)) if names else None
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return None
    from transformers.core_model_loading import build_glob_alternation

    return build_glob_alternation(list(plan))[0]


def natural_key(name: str) -> Any:
    """The key of the order in which transformers stacks the parts of a tensor."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def in_order(names: Iterable[str]) -> list[str]:
    """The `names`, given in the model's order, in the one in which transformers writes them."""
    return sorted(names, key=natural_key) if _converts() else list(names)


def to_disk(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The conversion of `save_pretrained`: packed experts are unpacked, prefixes renamed back."""
    if not _converts():
        old: Any = model
        prefixes = {new: pattern for pattern, new in _prefixes(old).items()}
        plain = {new: re.sub(r"\(.*\)", "", pattern.lstrip("^")) for new, pattern in prefixes.items()}
        return old._fix_state_dict_keys_on_save({_renamed(name, plain): t for name, t in tensors.items()})
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


class Loading:
    """The places where `from_pretrained` puts tensors, by their name in files; nothing is loaded.

    A name in files may lack the base model's prefix, have one too many, or be an older
    class's name; transformers renames all these, so its own rules answer here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.prefixes = {} if _converts() else _prefixes(model)
        self.state = model.state_dict()
        self.prefix = model.base_model_prefix
        self.converters: list[Any] = []
        self.renamings: list[Any] = []
        if _converts():
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

            mapping = get_model_conversion_mapping(model)
            self.converters = [t for t in mapping if isinstance(t, WeightConverter)]
            self.renamings = [t for t in mapping if isinstance(t, WeightRenaming)]

    def place(self, name: str) -> tuple[str, str | None]:
        """The in-memory name of a tensor, and its pattern if it is part of a conversion."""
        if not _converts():
            return self._named(name), None
        from transformers.core_model_loading import rename_source_key

        found = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if found[0] not in self.state and name in self.state:
            found = rename_source_key(name, [], [], self.prefix, self.state)
        return found

    def unexpected(self, name: str) -> set[str]:
        """The names in transformers' report for a tensor that the class does not read."""
        found, pattern = self.place(name)
        if not _converts():
            return {name, found, found.removeprefix(f"{self.prefix}.")}
        converter = next((c for c in self.converters if pattern in c.source_patterns), None)
        targets = converter.target_patterns if converter else []
        return {found, *(found.replace(targets[0], target) for target in targets)}

    def _named(self, name: str) -> str:
        """The in-memory name in transformers 4; the name itself with its class's renamings if none has it."""
        new = _renamed(self.model._fix_state_dict_key_on_load(name)[0], self.prefixes)
        candidates = (new, f"{self.prefix}.{new}", new.removeprefix(f"{self.prefix}."))
        return next((k for k in candidates if k in self.state), new)


def untested() -> list[str]:
    """A note about an installed transformers that was never tested; else none."""
    if any(first <= _version() <= last for first, last in TESTED):
        return []
    import transformers

    tested = " and ".join(f"{first[0]}.{first[1]} to {last[0]}.{last[1]}" for first, last in TESTED)
    return [f"transformers {transformers.__version__} is untested here; {tested} are tested"]


@cache
def _version() -> tuple[int, int]:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def _converts() -> bool:
    """Whether transformers has rules for converting tensors: it does from version 5 on."""
    return _version() >= (5, 0)


def _dtype_key() -> str:
    """The name of the keyword, and of a configuration's attribute, for the dtype."""
    return "dtype" if _version() >= (4, 56) else "torch_dtype"


def _modeling() -> Any:
    """The module in which transformers 4 saves and loads."""
    from transformers import modeling_utils

    return modeling_utils


def _prefixes(model: Any) -> Mapping[str, str]:
    """{pattern of a prefix in files: prefix in memory} of transformers 4, which has them for its older image models."""
    classes = [cls.__name__.lower() for cls in type(model).__mro__[:-1]]
    if any(kind in name for kind in getattr(_modeling(), "VLMS", ()) for name in classes):
        return model._checkpoint_conversion_mapping
    return {}


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    """The name after the first of `patterns` that it has."""
    for pattern, replacement in patterns.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name

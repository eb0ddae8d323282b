"""The skeleton of a model that transformers knows: its class on the meta device, asked by transformers' own rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from verl_autoexport.errors import PlanError
from verl_autoexport.model import transformers_api
from verl_autoexport.model.dtypes import OWN_DTYPES
from verl_autoexport.model.model_class import load_config, model_class
from verl_autoexport.shards.manifest import FLOATING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class TransformersSkeleton:
    """A `Skeleton`; `model` is the model on the meta device."""

    def __init__(self, model: PreTrainedModel, trust_remote_code: bool = False) -> None:
        state = model.state_dict()
        parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
        self.model = model
        self.name: str = type(model).__name__
        self.config: PretrainedConfig = model.config
        self.trust_remote_code: bool = trust_remote_code
        self.tensors: Mapping[str, torch.Tensor] = {k: state[k] for k in (*parameters, *state) if k in state}
        self.tied: Mapping[str, str] = transformers_api.tied_names(model)
        self.unsaved: frozenset[str] = frozenset(model._keys_to_ignore_on_save or ())
        self.modules: Mapping[str, str] = {path: type(module).__name__ for path, module in model.named_modules()}
        self.generates: bool = model.can_generate()
        self._rules: dict[str, tuple[Mapping[str, str], re.Pattern[str] | None]] = {}

    @classmethod
    def of(
        cls,
        directory: Path,
        dtype: str,
        trust_remote_code: bool = False,
        architecture: str | None = None,
        num_labels: int | None = None,
    ) -> TransformersSkeleton:
        """The skeleton of the model in `directory`; raises PlanError if it cannot be built.

        `dtype` is the export dtype; with `source` and `base` the configuration keeps its own. `architecture`
        and `num_labels` override those of `config.json`.
        """
        config = load_config(directory, trust_remote_code)
        if architecture is not None:
            config.architectures = [architecture]
        if num_labels is not None:
            config.num_labels = num_labels
        found = model_class(config, directory, trust_remote_code)
        try:
            model = transformers_api.build(found, config, None if dtype in OWN_DTYPES else getattr(torch, dtype))
        except Exception as e:
            raise PlanError(
                f"{directory / 'config.json'}: {found.__name__} cannot be built from it: {type(e).__name__}: {e}"
            ) from e
        return cls(model, trust_remote_code)

    def to_disk(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return transformers_api.to_disk(self.model, tensors)

    def place(self, name: str) -> tuple[str, str | None]:
        return self._loading.place(name)

    def optional(self, name: str) -> bool:
        fqn = self.place(name)[0]
        if fqn in self.tensors:
            return _matches(self.model._keys_to_ignore_on_load_missing, fqn)
        ignored = self.model._keys_to_ignore_on_load_unexpected
        return any(_matches(ignored, key) for key in self._loading.unexpected(name))

    def dtype_of(self, fqn: str, dtype: str) -> str:
        if dtype not in self._rules:
            self._rules[dtype] = self._rule(getattr(torch, dtype))
        built, in_float32 = self._rules[dtype]
        if in_float32 and in_float32.search(fqn):
            return "float32"
        found = built.get(fqn, dtype)
        return found if found in FLOATING else dtype

    @property
    def output_embeddings(self) -> str | None:
        head = self.model.get_output_embeddings()
        names = (f"{path}.weight" for path, module in self.model.named_modules() if module is head)
        return next((name for name in names if name in self.tensors), None)

    @cached_property
    def _loading(self) -> transformers_api.Loading:
        return transformers_api.Loading(self.model)

    def _rule(self, dtype: torch.dtype) -> tuple[Mapping[str, str], re.Pattern[str] | None]:
        """The dtypes in a model built in `dtype`, since a class may create a tensor in its own; and float32's names."""
        model = transformers_api.in_dtype(self.model, dtype)
        built = {name: str(t.dtype).removeprefix("torch.") for name, t in model.state_dict().items()}
        return built, transformers_api.kept_in_float32(model, dtype)


def _matches(patterns: Iterable[str] | None, key: str) -> bool:
    return any(re.search(pattern, key) for pattern in patterns or ())

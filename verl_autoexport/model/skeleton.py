"""The skeleton: the model without weights. It is built once for an export, and everything asks it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from verl_autoexport.errors import AutoExportError, PlanError
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton
from verl_autoexport.system import plugins
from verl_autoexport.system.untrusted import read_json

if TYPE_CHECKING:
    import torch

GROUP = "verl_autoexport.skeletons"
"""The entry points through which other packages add skeletons; the name of one is a `model_type`."""


class Skeleton(Protocol):
    """The tensors of a model: their names in memory, as training has them, and those on disk, as readers expect them.

    A class that inherits from this one may leave out whatever has a value here.
    """

    name: str
    """The model's class, as `architectures` in the published `config.json` names it."""
    config: Any
    """The transformers configuration that is published; its class is one that `AutoConfig` knows."""
    tensors: Mapping[str, torch.Tensor]
    """Meta tensors by name in memory: all that the shards hold, parameters before buffers."""
    trust_remote_code: bool = False
    """Whether code beside the model, its tokenizer and its base model may run."""
    tied: Mapping[str, str] = MappingProxyType({})
    """{alias: the name it is tied to}, both in memory. Aliases are not written, and the shards may lack them."""
    unsaved: frozenset[str] = frozenset()
    """The names in memory of tensors that are not written."""
    modules: Mapping[str, str] = MappingProxyType({})
    """{path in memory: class name} of all modules, so that a LoRA adapter can name its targets briefly."""
    generates: bool = True
    """Whether the model generates text, and so has a generation config."""

    @property
    def output_embeddings(self) -> str | None:
        """The name in memory of the output embeddings' weight; None if there are none."""
        return None

    def to_disk(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors on disk, by name, of some tensors in memory: views of these, or joins; nothing computed."""
        ...

    def place(self, name: str) -> tuple[str, str | None]:
        """The name in memory of a tensor on disk, and the part of it that this one is; None if it is all of it.

        A tensor that the model does not read has a name that is not in `tensors`.
        """
        ...

    def dtype_of(self, fqn: str, dtype: str) -> str:
        """The dtype of a floating tensor, by name in memory, in a model that is loaded in `dtype`."""
        return dtype

    def optional(self, name: str) -> bool:
        """Whether loading stays silent if this tensor is missing, or present but unread."""
        return False


def build_skeleton(directory: Path, dtype: str, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the model whose `config.json` is in `directory`; raises PlanError if it cannot be built.

    `dtype` is the export dtype, which a configuration may name in several places.
    """
    made_by = registered(directory)
    if made_by is None:
        return TransformersSkeleton.of(directory, dtype, trust_remote_code)
    try:
        return made_by(directory, dtype, trust_remote_code)
    except AutoExportError:
        raise
    except Exception as e:
        raise PlanError(
            f"{directory / 'config.json'}: {made_by.__module__}.{made_by.__qualname__}, an entry point of {GROUP}, "
            f"cannot be built from it: {type(e).__name__}: {e}"
        ) from e


def registered(directory: Path) -> Callable[[Path, str, bool], Skeleton] | None:
    """The class that another package registers for the `model_type` in `directory`; None if there is none."""
    model_type = None
    with suppress(OSError, ValueError):  # whoever reads it next reports the problem
        model_type = read_json(directory / "config.json").get("model_type")
    return plugins.find(GROUP, model_type) if isinstance(model_type, str) else None


def import_external(external_lib: str | None) -> None:
    """Imports verl's `external_lib`, modules with commas between them, which may register models."""
    for module in external_lib.split(",") if external_lib else ():
        importlib.import_module(module.strip())

"""The class of a value model's shards: verl's critic has a head that its `config.json` does not name.

verl builds a critic with `AutoModelForTokenClassification` from the configuration of the
starting model, and saves that configuration: `architectures` still names the language model.
The tensors show the head; transformers' own mapping gives the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from verl_autoexport.errors import PlanError
from verl_autoexport.model.base_model import brief
from verl_autoexport.model.conversion import reverse
from verl_autoexport.model.model_class import architecture
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_AUTO_CLASSES = ("AutoModelForTokenClassification", "AutoModelForSequenceClassification")


@dataclass(frozen=True)
class Head:
    """The class to export instead of the one in `config.json`, and the changes of its head.

    `added` and `removed` are names on disk, compared with the class in `config.json`.
    """

    architecture: str
    num_labels: int
    added: frozenset[str]
    removed: frozenset[str]


def find_head(named: Skeleton, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Head | None:
    """The head that is in the shards but not in `named`, the skeleton of `config.json`; None if there is none.

    `shapes` are the shards' by in-memory name. Raises PlanError if several classes, or
    none that transformers can load, would fit.
    """
    expected = named.tensors.keys()
    surplus = shapes.keys() - expected
    if not surplus or not isinstance(named, TransformersSkeleton):
        return None
    if wrapped := sorted(name for name in surplus if name.startswith(("v_head.", "pretrained_model."))):
        raise PlanError(
            f"the shards hold {brief(wrapped)}: trl's AutoModelForCausalLMWithValueHead, which verl takes for a "
            f"{type(named.config).__name__} since transformers has no token classifier of it. No class of transformers "
            "loads such a directory without dropping the value head; exports of it are not supported."
        )
    fitting = {}
    for name in _candidates(named.config):
        skeleton = TransformersSkeleton.of(directory, "source", named.trust_remote_code, name)
        head = _head(skeleton, expected, shapes)
        if head is not None and head.added == surplus:
            fitting[name] = head
    if not fitting:
        return None
    if both := sorted({k for head in fitting.values() for k in head.removed} & shapes.keys()):
        raise PlanError(
            f"the shards hold both {brief(sorted(surplus))} of a {next(iter(fitting))} and {brief(both)} "
            f"of the {named.name} in config.json: which model it is cannot be told."
        )
    if len(fitting) > 1:
        raise PlanError(
            f"{brief(sorted(surplus))} in the shards fit several classes: {', '.join(fitting)}. Set "
            f"`architectures` in {directory / 'config.json'} to the right one."
        )
    head = next(iter(fitting.values()))
    return replace(head, removed=frozenset(reverse(named, {k: named.tensors[k] for k in head.removed})))


def _head(skeleton: Skeleton, expected: Set[str], shapes: Mapping[str, tuple[int, ...]]) -> Head | None:
    added, removed = skeleton.tensors.keys() - expected, expected - skeleton.tensors.keys()
    sizes = {shapes[name][0] for name in added if shapes.get(name)}
    if len(sizes) != 1:
        return None
    return Head(skeleton.name, sizes.pop(), frozenset(added), frozenset(removed))


def _candidates(config: PretrainedConfig) -> Iterator[str]:
    """The names of the classifiers that transformers' auto classes build from `config`."""
    import transformers

    auto_map = getattr(config, "auto_map", None) or {}
    for auto in _AUTO_CLASSES:
        found = auto_map.get(auto) or getattr(transformers, auto)._model_mapping.get(type(config), None)
        if found is None:
            continue
        for cls in found if isinstance(found, tuple) else (found,):
            name = cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__
            if name != architecture(config):
                yield name

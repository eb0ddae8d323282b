"""The class of a value model's shards: verl's critic has a head that its `config.json` does not name.

verl builds a critic with `AutoModelForTokenClassification` from the configuration of the
starting model, and saves that configuration: `architectures` still names the language model.
The tensors show the head; transformers' own mapping gives the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.errors import PlanError
from verl_autoexport.model.base_model import brief
from verl_autoexport.model.conversion import reverse
from verl_autoexport.model.skeleton import architecture, build_skeleton

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


def find_head(
    named: Any, directory: Path, shapes: Mapping[str, tuple[int, ...]], trust_remote_code: bool = False
) -> Head | None:
    """The head that is in the shards but not in `named`, the skeleton of `config.json`; None if there is none.

    `shapes` are the shards' by in-memory name. Raises PlanError if several classes, or
    none that transformers can load, would fit.
    """
    expected = named.state_dict().keys()
    surplus = shapes.keys() - expected
    if not surplus:
        return None
    if wrapped := sorted(name for name in surplus if name.startswith(("v_head.", "pretrained_model."))):
        raise PlanError(
            f"the shards hold {brief(wrapped)}: trl's AutoModelForCausalLMWithValueHead, which verl takes for a "
            f"{type(named.config).__name__} since transformers has no token classifier of it. No class of transformers "
            "loads such a directory without dropping the value head; exports of it are not supported."
        )
    fitting = {}
    for name in _candidates(named.config):
        skeleton = build_skeleton(directory, "source", trust_remote_code=trust_remote_code, architecture=name)
        head = _head(skeleton, expected, shapes)
        if head is not None and head.added == surplus:
            fitting[name] = head
    if not fitting:
        return None
    if both := sorted({k for head in fitting.values() for k in head.removed} & shapes.keys()):
        raise PlanError(
            f"the shards hold both {brief(sorted(surplus))} of a {next(iter(fitting))} and {brief(both)} "
            f"of the {type(named).__name__} in config.json: which model it is cannot be told."
        )
    if len(fitting) > 1:
        raise PlanError(
            f"{brief(sorted(surplus))} in the shards fit several classes: {', '.join(fitting)}. Set "
            f"`architectures` in {directory / 'config.json'} to the right one."
        )
    head = next(iter(fitting.values()))
    state = named.state_dict()
    return replace(head, removed=frozenset(reverse(named, {k: state[k] for k in head.removed})))


def _head(skeleton: Any, expected: Any, shapes: Mapping[str, tuple[int, ...]]) -> Head | None:
    tensors = skeleton.state_dict()
    added, removed = tensors.keys() - expected, expected - tensors.keys()
    sizes = {shapes[name][0] for name in added if shapes.get(name)}
    if len(sizes) != 1:
        return None
    return Head(type(skeleton).__name__, sizes.pop(), frozenset(added), frozenset(removed))


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

"""Names in memory → names on disk, by transformers' own rules on a skeleton.

`save_pretrained` writes the result of `revert_weight_conversion` on the state dict
(transformers 5: packed experts are unpacked, prefixes renamed back). Here the same
function runs on meta tensors, so that the names are known before a byte is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import Output, whole
from verl_autoexport.model.dtypes import DtypeRule
from verl_autoexport.model.skeleton import tied_names
from verl_autoexport.model.trace import trace
from verl_autoexport.shards.manifest import FLOATING, ShardManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def name_outputs(skeleton: PreTrainedModel, manifest: ShardManifest, dtype: str) -> list[Output]:
    """Every output, in the order of a loaded model's `save_pretrained`; raises PlanError unless the model is whole.

    Tied aliases are dropped (the planner checks that their values are equal, see
    `tied_aliases`), `dtype` applies to floating tensors only, and tensors that transformers
    keeps in float32 for that dtype stay float32.
    """
    from transformers.core_model_loading import dot_natural_key

    kept = sorted(_check_complete(skeleton, manifest), key=dot_natural_key)
    dropped = tied_aliases(skeleton, manifest).keys() | set(skeleton._keys_to_ignore_on_save or ())
    rule = DtypeRule(skeleton, dtype)
    metas = {}
    for fqn in (k for k in kept if k not in dropped):
        entry = manifest.tensors[fqn]
        target = getattr(torch, rule(fqn, entry.value_dtype))
        metas[fqn] = torch.empty(entry.shape, dtype=target, device="meta")
    outputs = trace(partial(reverse, skeleton), metas)
    if lost := sorted(metas.keys() - {piece.fqn for output in outputs for piece in output.pieces}):
        raise PlanError(
            f"{type(skeleton).__name__}: transformers does not write {_brief(lost)} to disk; "
            "an export would lack these trained tensors."
        )
    return outputs


def class_outputs(skeleton: PreTrainedModel) -> list[Output]:
    """The tensors of a saved model of this class, without tied aliases and ignored keys, in the skeleton's dtypes."""
    ignored = tied_names(skeleton).keys() | set(skeleton._keys_to_ignore_on_save or ())
    state = {k: v for k, v in skeleton.state_dict().items() if k not in ignored}
    metas = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in state.items()}
    return trace(partial(reverse, skeleton), metas)


def tied_aliases(skeleton: PreTrainedModel, manifest: ShardManifest) -> dict[str, str]:
    """{alias: name it is tied to} of the aliases that are in the shards too; only the latter is written."""
    tied = tied_names(skeleton)
    return {a: b for a, b in tied.items() if a in manifest.tensors and b in manifest.tensors}


def _check_complete(skeleton: PreTrainedModel, manifest: ShardManifest) -> list[str]:
    name = type(skeleton).__name__
    state = skeleton.state_dict()
    expected = {k: tuple(v.shape) for k, v in state.items()}
    tied = tied_names(skeleton)
    missing = [k for k in expected if k not in manifest.tensors and tied.get(k) not in manifest.tensors]
    unexpected = [k for k in manifest.tensors if k not in expected]
    wrong = [
        f"{k}: {name} has {list(expected[k])}, the shards have {list(t.shape)}"
        for k, t in manifest.tensors.items()
        if k in expected and tuple(t.shape) != expected[k]
    ]
    wrong += [
        f"{k}: {name} has {str(state[k].dtype).removeprefix('torch.')}, the shards have {t.value_dtype}"
        for k, t in manifest.tensors.items()
        if k in expected and state[k].is_floating_point() != (t.value_dtype in FLOATING)
    ]
    if missing or unexpected or wrong:
        raise PlanError(
            f"the shards are not a complete {name}: missing {_brief(missing)}; unexpected {_brief(unexpected)}; "
            f"wrong shape or kind {_brief(wrong)}. {_advice(skeleton, manifest, missing, expected)}"
        )
    return [k for k in expected if k in manifest.tensors]


def _advice(
    skeleton: PreTrainedModel, manifest: ShardManifest, missing: list[str], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """The keys of `config.json` that contradict the shards, as far as the shards show it."""
    config, said = skeleton.config.get_text_config(), []
    head = skeleton.get_output_embeddings()
    heads = [f"{path}.weight" for path, module in skeleton.named_modules() if head is not None and module is head]
    if missing and set(missing) <= set(heads):
        said.append("tie_word_embeddings is false, and they hold no output embeddings: was it trained tied?")
    rows = {(expected[k][:1], tuple(t.shape)[:1]) for k, t in manifest.tensors.items() if k in expected}
    for key in ("vocab_size", "num_labels"):
        size = getattr(config if key == "vocab_size" else skeleton.config, key, None)
        if found := sorted({theirs[0] for ours, theirs in rows if ours == (size,) and theirs and theirs != ours}):
            said.append(f"{key} is {size}, they hold {found[0]} rows")
    return f"In config.json {'; '.join(said)}." if said else "Is config.json that of the trained model?"


def reverse(skeleton: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' own conversion from in-memory tensors to those on disk; raises PlanError if it fails."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(skeleton, dict(tensors))
    except Exception as e:
        raise PlanError(
            f"{type(skeleton).__name__}: transformers cannot convert {_brief(tensors)} back to names on disk: {e}"
        ) from e


class Loading:
    """The places where `from_pretrained` puts tensors, by their name in files; nothing is loaded.

    A name in files may lack the base model's prefix, have one too many, or be an older
    class's name; transformers renames all these, so its own rules answer here.
    """

    def __init__(self, skeleton: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(skeleton)
        self.converters = [t for t in mapping if isinstance(t, WeightConverter)]
        self.renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        self.state = skeleton.state_dict()
        self.prefix = skeleton.base_model_prefix
        self.rename = rename_source_key

    def place(self, name: str) -> tuple[str, str | None]:
        """The in-memory name of a tensor, and its pattern if it is part of a conversion."""
        found = self.rename(name, self.renamings, self.converters, self.prefix, self.state)
        if found[0] not in self.state and name in self.state:
            found = self.rename(name, [], [], self.prefix, self.state)
        return found

    def parameter(self, name: str) -> str | None:
        """The in-memory tensor that a tensor becomes, or becomes part of; None if the class reads no such tensor."""
        found = self.place(name)[0]
        return found if found in self.state else None

    def unexpected(self, name: str) -> set[str]:
        """The names in transformers' report for a tensor that the class does not read."""
        found, pattern = self.place(name)
        converter = next((c for c in self.converters if pattern in c.source_patterns), None)
        targets = converter.target_patterns if converter else []
        return {found, *(found.replace(targets[0], target) for target in targets)}


@dataclass(frozen=True)
class Spelling:
    """Other files' names for the tensors that a class writes, proven by transformers' loading the same tensors.

    `names`: ours → theirs. `whole`: in-memory names → theirs for tensors that those files have as in
    memory, while transformers would split or join them; `shapes` are the shapes of these.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def apply(self, outputs: Iterable[Output]) -> list[Output]:
        """The `outputs` as those files store them."""
        made: dict[str, Output] = {}
        for output in outputs:
            parts = [p for p in output.pieces if p.fqn in self.whole]
            made |= {} if parts else {output.name: replace(output, name=self.names.get(output.name, output.name))}
            for fqn in (p.fqn for p in parts if self.whole[p.fqn] not in made):
                shape = self.shapes[fqn]
                made[self.whole[fqn]] = Output(self.whole[fqn], shape, output.dtype, whole(fqn, shape))
        return list(made.values())


def spell(skeleton: PreTrainedModel, outputs: Sequence[Output], theirs: Collection[str]) -> Spelling:
    """The spelling, in files with the names `theirs`, of those `outputs` that are not among these names."""
    from transformers.core_model_loading import dot_natural_key

    ours = {o.name: o for o in outputs if o.name not in theirs}
    only_theirs = set(theirs) - {o.name for o in outputs}
    if not ours or not only_theirs:
        return Spelling()
    loading, tied = Loading(skeleton), tied_names(skeleton)

    def placed(names: Iterable[str]) -> dict[tuple[str, str | None], list[str]]:
        places = defaultdict(list)
        for name in sorted(names, key=dot_natural_key):  # the order in which transformers stacks the parts of a tensor
            places[loading.place(name)].append(name)
        return {place: found for place, found in places.items() if place[0] in loading.state}

    other, spelled = placed(only_theirs), {}
    for (parameter, pattern), names in placed(ours).items():
        same = [parameter, *(alias for alias, target in tied.items() if target == parameter)]
        found = next((other[name, pattern] for name in same if (name, pattern) in other), [])
        if len(found) == len(names):
            spelled |= zip(names, found, strict=True)
    made = [{p.fqn for p in output.pieces} for output in outputs]
    written = frozenset().union(*made)
    held = {place[0]: found[0] for place, found in other.items() if place[1] is None and len(found) == 1}
    held = {fqn: name for fqn, name in held.items() if fqn in written and name not in spelled.values()}
    while torn := {fqn for fqns in made if not fqns <= held.keys() for fqn in fqns & held.keys()}:
        held = {fqn: name for fqn, name in held.items() if fqn not in torn}
    return Spelling(spelled, held, {fqn: tuple(loading.state[fqn].shape) for fqn in held})


def _brief(names: Iterable[str]) -> str:
    names = list(names)
    return "none" if not names else ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")

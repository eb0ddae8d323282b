"""Names in memory → names on disk, by the rules of a skeleton.

Its conversion runs on meta tensors, so that the names are known before a byte is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import Output, whole
from verl_autoexport.model.dtypes import disk_dtype
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.model.trace import trace
from verl_autoexport.model.transformers_api import in_order, natural_key
from verl_autoexport.shards.manifest import FLOATING, ShardManifest


def name_outputs(skeleton: Skeleton, manifest: ShardManifest, dtype: str) -> list[Output]:
    """Every output, in the order of a loaded model's `save_pretrained`; raises PlanError unless the model is whole.

    Tied aliases are dropped (the planner checks that their values are equal, see
    `tied_aliases`), `dtype` applies to floating tensors only, and tensors that transformers
    keeps in float32 for that dtype stay float32.
    """
    kept = in_order(_check_complete(skeleton, manifest))
    dropped = tied_aliases(skeleton, manifest).keys() | skeleton.unsaved
    metas = {}
    for fqn in (k for k in kept if k not in dropped):
        entry = manifest.tensors[fqn]
        target = getattr(torch, disk_dtype(skeleton, fqn, entry.value_dtype, dtype))
        metas[fqn] = torch.empty(entry.shape, dtype=target, device="meta")
    outputs = trace(partial(reverse, skeleton), metas)
    if lost := sorted(metas.keys() - {piece.fqn for output in outputs for piece in output.pieces}):
        raise PlanError(
            f"{skeleton.name}: its conversion does not write {_brief(lost)} to disk; "
            "an export would lack these trained tensors."
        )
    return outputs


def class_outputs(skeleton: Skeleton) -> list[Output]:
    """The tensors of a saved model of this class, without tied aliases and ignored keys, in the skeleton's dtypes."""
    written = {k: v for k, v in skeleton.tensors.items() if k not in skeleton.tied and k not in skeleton.unsaved}
    metas = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in written.items()}
    return trace(partial(reverse, skeleton), metas)


def tied_aliases(skeleton: Skeleton, manifest: ShardManifest) -> dict[str, str]:
    """{alias: name it is tied to} of the aliases that are in the shards too; only the latter is written."""
    return {a: b for a, b in skeleton.tied.items() if a in manifest.tensors and b in manifest.tensors}


def _check_complete(skeleton: Skeleton, manifest: ShardManifest) -> list[str]:
    name, state, tied = skeleton.name, skeleton.tensors, skeleton.tied
    expected = {k: tuple(v.shape) for k, v in state.items()}
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
    skeleton: Skeleton, manifest: ShardManifest, missing: list[str], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """The keys of `config.json` that contradict the shards, as far as the shards show it."""
    config, said = skeleton.config.get_text_config(), []
    if missing and set(missing) <= {skeleton.output_embeddings}:
        said.append("tie_word_embeddings is false, and they hold no output embeddings: was it trained tied?")
    rows = {(expected[k][:1], tuple(t.shape)[:1]) for k, t in manifest.tensors.items() if k in expected}
    for key in ("vocab_size", "num_labels"):
        size = getattr(config if key == "vocab_size" else skeleton.config, key, None)
        if found := sorted({theirs[0] for ours, theirs in rows if ours == (size,) and theirs and theirs != ours}):
            said.append(f"{key} is {size}, they hold {found[0]} rows")
    return f"In config.json {'; '.join(said)}." if said else "Is config.json that of the trained model?"


def reverse(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors on disk that these tensors in memory become; raises PlanError if the conversion fails."""
    try:
        return skeleton.to_disk(tensors)
    except Exception as e:
        raise PlanError(f"{skeleton.name}: {_brief(tensors)} cannot be converted back to names on disk: {e}") from e


def read_as(skeleton: Skeleton, name: str) -> str | None:
    """The tensor in memory that a tensor on disk becomes, or becomes part of; None if the model does not read it."""
    found = skeleton.place(name)[0]
    return found if found in skeleton.tensors else None


@dataclass(frozen=True)
class Spelling:
    """Other files' names for the tensors that a model writes: loading puts both into the same tensors in memory.

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


def spell(skeleton: Skeleton, outputs: Sequence[Output], theirs: Collection[str]) -> Spelling:
    """The spelling, in files with the names `theirs`, of those `outputs` that are not among these names."""
    ours = {o.name: o for o in outputs if o.name not in theirs}
    only_theirs = set(theirs) - {o.name for o in outputs}
    if not ours or not only_theirs:
        return Spelling()

    def placed(names: Iterable[str]) -> dict[tuple[str, str | None], list[str]]:
        places = defaultdict(list)
        for name in sorted(names, key=natural_key):  # the order in which the parts of a tensor are stacked
            places[skeleton.place(name)].append(name)
        return {place: found for place, found in places.items() if place[0] in skeleton.tensors}

    other, spelled = placed(only_theirs), {}
    for (parameter, pattern), names in placed(ours).items():
        same = [parameter, *(alias for alias, target in skeleton.tied.items() if target == parameter)]
        found = next((other[name, pattern] for name in same if (name, pattern) in other), [])
        if len(found) == len(names):
            spelled |= zip(names, found, strict=True)
    made = [{p.fqn for p in output.pieces} for output in outputs]
    written = frozenset().union(*made)
    held = {place[0]: found[0] for place, found in other.items() if place[1] is None and len(found) == 1}
    held = {fqn: name for fqn, name in held.items() if fqn in written and name not in spelled.values()}
    while torn := {fqn for fqns in made if not fqns <= held.keys() for fqn in fqns & held.keys()}:
        held = {fqn: name for fqn, name in held.items() if fqn not in torn}
    return Spelling(spelled, held, {fqn: tuple(skeleton.tensors[fqn].shape) for fqn in held})


def _brief(names: Iterable[str]) -> str:
    names = list(names)
    return "none" if not names else ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")

"""What is to be written against the files of the base model: the same names, shapes and layout.

A model that training did not change in kind has the tensors of its base, one for one.
Every difference is either explained, and listed in `export.json`, or refused before
anything is written. Where base and transformers differ in the layout only, the base wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verl_autoexport.errors import ConfigError, PlanError
from verl_autoexport.export import naming
from verl_autoexport.export.base import BaseModel, BaseTensor, brief, find_base
from verl_autoexport.export.heads import Head
from verl_autoexport.export.plan import Output
from verl_autoexport.sources.base import FLOATING

Shapes = Mapping[str, tuple[int, ...]]
Excuse = Callable[[str], str | None]
_MOVED_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # in old files; no class reads them any more


@dataclass(frozen=True)
class Contract:
    """The outcome of a comparison that did not refuse; without a `base` there was none, for `reason`.

    `explained` maps why they differ to the names that do; `transposed` are those written in
    the base's layout, with the last two dimensions swapped.
    """

    base: BaseModel | None = None
    reason: str = ""
    explained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def to_check(self) -> dict[str, Any]:
        """The entry `verification.contract` of `export.json`."""
        if self.base is None:
            return {"status": "skipped", "detail": self.reason}
        detail = f"names, shapes and layout of {len(self.base.tensors)} tensors in {self.base.directory}"
        listed = [f"{why}: {brief(names)}" for why, names in self.explained.items()]
        check: dict[str, Any] = {"status": "passed", "detail": "; ".join([detail, *listed])}
        if self.explained:
            check["explained"] = {why: list(names) for why, names in self.explained.items()}
        if self.transposed:
            check["transposed"] = sorted(self.transposed)
        return check


@dataclass(frozen=True)
class Excuses:
    """Why a tensor may differ: each takes a name and gives the reason, or None.

    `vocabulary` is the size in the base and the one to be written.
    """

    lacking: Excuse
    added: Excuse
    vocabulary: tuple[int | None, int | None]

    def reshaped(self, ours: Sequence[int], theirs: Sequence[int]) -> str | None:
        before, now = self.vocabulary
        if before != now and ours[1:] == theirs[1:] and (theirs[:1], ours[:1]) == ((before,), (now,)):
            return f"vocabulary resized from {before} to {now}"
        return None


def check_contract(
    skeleton: Any, head: Head | None, outputs: Iterable[Output], base_model: str | None, trust_remote_code: bool = False
) -> Contract:
    """Compare what `outputs` will be with the base model at `base_model`, where there is one at hand.

    Raises PlanError listing the names that differ without a reason.
    """
    base, reason = find_base(base_model)
    if base is None:
        return Contract(reason=reason)
    ours = {o.name: o.shape for o in outputs}
    return compare(ours, base, _excuses(skeleton, head, base, trust_remote_code))


def check_start(base_model: str | None, dtype: str, trust_remote_code: bool, external_lib: str | None) -> Contract:
    """Before anything is trained: is what transformers writes of the base model what the base model is?

    Raises PlanError listing the names that differ, ConfigError where `dtype` needs a base
    and none is at hand.
    """
    base, reason = find_base(base_model)
    if base is None:
        check_dtype(dtype, None, reason)
        return Contract(reason=reason)
    skeleton = naming.build_skeleton(
        base.directory, "source", trust_remote_code=trust_remote_code, external_lib=external_lib
    )
    return compare(naming.names_on_disk(skeleton), base, _excuses(skeleton, None, base, trust_remote_code))


def check_dtype(dtype: str, base: BaseModel | None, reason: str) -> None:
    """Raises ConfigError where `dtype` is `base` and there is none."""
    if dtype == "base" and base is None:
        raise ConfigError(
            f"dtype base takes each tensor's dtype from the base model's safetensors, but {reason}. "
            "Name its directory (--base-model, or the run's model path), or name a dtype."
        )


def compare(ours: Shapes, base: BaseModel, excuses: Excuses) -> Contract:
    """Pure: `ours` is what will be written. Raises PlanError listing the names that differ without a reason."""
    explained: dict[str, list[str]] = {}
    wrong: dict[str, list[str]] = {"missing": [], "not in the base": [], "of another shape": []}
    transposed = set()

    def settle(reason: str | None, name: str, kind: str, text: str) -> None:
        if reason is not None:
            explained.setdefault(reason, []).append(name)
        else:
            wrong[kind].append(text)

    for name in base.tensors.keys() - ours.keys():
        settle(excuses.lacking(name), name, "missing", name)
    for name in ours.keys() - base.tensors.keys():
        settle(excuses.added(name), name, "not in the base", name)
    for name in ours.keys() & base.tensors.keys():
        shape, expected = tuple(ours[name]), base.tensors[name].shape
        if shape == expected:
            continue
        if _swapped(shape) == expected:
            transposed.add(name)
            settle("in the base's layout, last two dimensions swapped", name, "of another shape", name)
        else:
            text = f"{name} (base {list(expected)}, here {list(shape)})"
            settle(excuses.reshaped(shape, expected), name, "of another shape", text)
    if any(wrong.values()):
        lists = "; ".join(f"{kind}: {brief(sorted(names))}" for kind, names in wrong.items() if names)
        raise PlanError(
            f"what would be written differs from the base model {base.directory}: {lists}. Engines that serve the "
            "base would not read it rightly. Is that the model that was trained, and its files as published?"
        )
    listed = {why: tuple(sorted(names)) for why, names in sorted(explained.items())}
    return Contract(base, explained=listed, transposed=frozenset(transposed))


def apply_base(outputs: Iterable[Output], contract: Contract, dtype: str) -> list[Output]:
    """`outputs` in the base's layout and, if `dtype` is `base`, in its dtypes."""
    check_dtype(dtype, contract.base, contract.reason)
    if dtype == "base":
        outputs = [replace(o, dtype=_base_dtype(o, contract.base)) for o in outputs]
    return [o.swapped if o.name in contract.transposed else o for o in outputs]


def _base_dtype(output: Output, base: BaseModel) -> str:
    theirs = base.tensors.get(output.name, BaseTensor((), base.usual_dtype)).dtype
    if output.dtype not in FLOATING:
        return output.dtype
    if theirs not in FLOATING:
        raise PlanError(
            f"{output.name}: {output.dtype} in training, {theirs} in the base model {base.directory}; such a tensor "
            "cannot be cast back. Name a dtype instead of `base`."
        )
    return theirs


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Packed experts only: a matrix whose shape is swapped is another matrix to every reader."""
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 2 else None


def _excuses(skeleton: Any, head: Head | None, base: BaseModel, trust_remote_code: bool) -> Excuses:
    state = skeleton.state_dict()
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    aliases = naming.reverse(skeleton, {k: state[k] for k in tied if k in state})
    unread = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), *_MOVED_BUFFERS]
    unsaved = set(skeleton._keys_to_ignore_on_save or ())
    name = type(skeleton).__name__
    base_config = naming.load_config(base.directory, trust_remote_code)
    own_head = frozenset() if tied or not _ties(base_config) else _output_embeddings(skeleton)

    def lacking(key: str) -> str | None:
        if key in aliases:
            return "tied, written once"
        if head is not None and key in head.removed:
            return f"replaced by the head of {name}"
        if key in unsaved or any(re.search(pattern, key) for pattern in unread):
            return f"no part of {name}"
        return None

    def added(key: str) -> str | None:
        if head is not None and key in head.added:
            return f"head of {name}"
        return "untied from the embeddings" if key in own_head else None

    return Excuses(lacking, added, (_vocabulary(base_config), _vocabulary(skeleton.config)))


def _ties(config: Any) -> bool:
    return any(getattr(c, "tie_word_embeddings", False) for c in (config, config.get_text_config()))


def _output_embeddings(skeleton: Any) -> frozenset[str]:
    module = skeleton.get_output_embeddings()
    names = {f"{path}.weight" for path, m in skeleton.named_modules() if module is not None and m is module}
    state = skeleton.state_dict()
    return frozenset(naming.reverse(skeleton, {k: state[k] for k in names & state.keys()}))


def _vocabulary(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)

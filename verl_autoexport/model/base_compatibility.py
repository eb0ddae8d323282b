"""Compares the planned files with those of the base model: the same names, shapes and layout.

A model that training did not change in kind has the tensors of its base, one for one.
Every difference is either explained, and listed in `export.json`, or refused before
anything is written. If base and transformers differ only in the layout or the name of a
tensor, the base wins.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from verl_autoexport.errors import ConfigError, PlanError
from verl_autoexport.merge.plan import SAFETENSORS_DTYPE, Output, whole
from verl_autoexport.model.base_model import BaseModel, BaseTensor, brief, find_base, with_files
from verl_autoexport.model.conversion import Spelling, class_outputs, read_as, reverse, spell
from verl_autoexport.model.dtypes import OWN_DTYPES
from verl_autoexport.model.model_class import load_config
from verl_autoexport.model.skeleton import Skeleton, build_skeleton, import_external
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton
from verl_autoexport.model.value_head import Head
from verl_autoexport.shards.manifest import FLOATING, ShardManifest

logger = logging.getLogger(__name__)
AllowedDifference = Callable[[str], str | None]
_MOVED_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")  # in old files; no class still reads them
_SWAPPED = "in the base's layout, last two dimensions swapped"
_CHECK = "autoexport.weights.base_check (--base-check)"
_CARRY = "autoexport.weights.carry_unread (--carry-unread)"


@dataclass(frozen=True)
class Compatibility:
    """The outcome of a comparison that refused nothing; `reason` says why there was none, or why there is no `base`.

    `explained` maps each reason for a difference to the names that differ; `transposed` are those written
    in the base's layout, with the last two dimensions swapped; `spelling` maps transformers' names to
    the base's. `unread` are tensors of the base that training never read, `carried` those of them
    that are copied. `differs` describes the differences that would have been refused.
    """

    base: BaseModel | None = None
    reason: str = ""
    explained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    spelling: Spelling = field(default_factory=Spelling)
    unread: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    differs: str = ""

    def to_check(self) -> dict[str, Any]:
        """The entry `verification.contract` of `export.json`."""
        if self.base is None or self.reason:
            return {"status": "skipped", "detail": self.reason}
        detail = f"names, shapes and layout of {len(self.base.tensors)} tensors in {self.base.directory}"
        if self.differs:
            return {"status": "differs", "detail": f"{detail}: {self.differs}"}
        listed = [f"{why}: {brief(names)}" for why, names in self.explained.items()]
        check: dict[str, Any] = {"status": "passed", "detail": "; ".join([detail, *listed])}
        for key in ("explained", "transposed", "carried"):
            if value := getattr(self, key):
                check[key] = {k: list(v) for k, v in value.items()} if key == "explained" else sorted(value)
        return check

    @property
    def notes(self) -> list[str]:
        """The lines for the `notes` of `export.json`."""
        if self.base is not None and self.differs:
            return [f"differs from the base model {self.base.directory}: {self.differs}"]
        if self.carried:
            return [f"the base's own, which training never read, were taken along: {brief(self.carried)}"]
        if self.unread:
            return [f"left out of the base, since training never read it: {brief(self.unread)}; see {_CARRY}"]
        return []

    @property
    def config_values(self) -> dict[str, int]:
        """{dotted key: value} that `config.json` must have, whatever the trained model's says.

        Such keys count the layers for multi-token prediction. Engines expect that many layers, but verl
        sets the number to 0; it is the base's if the layers are carried, and 0 if they are left out.
        """
        if self.base is None or not self.unread:
            return {}
        return {key: value if self.carried else 0 for key, value in self.base.predicting.items()}


@dataclass(frozen=True)
class AllowedDifferences:
    """The reasons for which a tensor may differ: each method takes a name and returns the reason, or None.

    `unread` applies only if nothing is written that the base lacks; otherwise it could be the same
    tensor under another name. `vocabulary` is the size in the base and the size to be written.
    """

    lacking: AllowedDifference
    unread: AllowedDifference
    added: AllowedDifference
    vocabulary: tuple[int | None, int | None]

    def reshaped(self, ours: Sequence[int], theirs: Sequence[int]) -> str | None:
        before, now = self.vocabulary
        if before != now and ours[1:] == theirs[1:] and (theirs[:1], ours[:1]) == ((before,), (now,)):
            return f"vocabulary resized from {before} to {now}"
        return None


def check_compatibility(
    skeleton: Skeleton,
    head: Head | None,
    outputs: Sequence[Output],
    base_model: str | None,
    *,
    base_check: str = "strict",
    carry_unread: bool = False,
) -> Compatibility:
    """Compares `outputs` with the base model at `base_model`, if there is one on this machine.

    Raises PlanError listing the names whose differences have no reason, unless `base_check` is `warn`.
    """
    found = _begin(base_model, base_check, carry_unread)
    if isinstance(found, Compatibility):
        return found
    allowed = _allowed_differences(skeleton, head, found)
    spelling = spell(skeleton, outputs, found.tensors)
    return compare(outputs, found, allowed, spelling, base_check=base_check, carry_unread=carry_unread)


def check_start(
    base_model: str | None,
    dtype: str,
    trust_remote_code: bool,
    external_lib: str | None,
    *,
    base_check: str = "strict",
    carry_unread: bool = False,
) -> Compatibility:
    """Checks before training that the base model, as transformers would write it, equals the base model.

    Raises PlanError as `check_compatibility` does, ConfigError if `dtype` needs a base and there is none here.
    """
    found = _begin(base_model, base_check, carry_unread)
    if isinstance(found, Compatibility):
        check_dtype(dtype, found.base, found.reason)
        return found
    if not found.config.get("architectures"):
        return Compatibility(reason=f"{found.directory / 'config.json'} names no architecture; exports are compared")
    import_external(external_lib)
    skeleton = build_skeleton(found.directory, "source", trust_remote_code)
    outputs = class_outputs(skeleton)
    allowed = _allowed_differences(skeleton, None, found, own=skeleton)
    spelling = spell(skeleton, outputs, found.tensors)
    return compare(outputs, found, allowed, spelling, base_check=base_check, carry_unread=carry_unread)


def _begin(base_model: str | None, base_check: str, carry_unread: bool) -> BaseModel | Compatibility:
    """The base to compare with, or the outcome without a comparison."""
    try:
        base, reason = find_base(base_model)
    except PlanError as e:
        if base_check != "off":
            raise PlanError(f"{e} {_way_out('off')}") from e
        base, reason = None, str(e)
    if carry_unread and (base is None or base_check == "off"):
        raise ConfigError(
            f"{_CARRY} takes tensors of the base model, but {reason or f'{_CHECK} is off'}. Name the base's directory "
            "(--base-model, or the run's model path), or leave it out."
        )
    if base is None:
        return Compatibility(reason=reason)
    return Compatibility(base, f"not compared with {base.directory}: {_CHECK} is off") if base_check == "off" else base


def check_dtype(dtype: str, base: BaseModel | None, reason: str) -> None:
    """Raises ConfigError if `dtype` is `base` and there is no base."""
    if dtype == "base" and base is None:
        raise ConfigError(
            f"dtype base takes each tensor's dtype from the base model's safetensors, but {reason}. "
            "Name its directory (--base-model, or the run's model path), or name a dtype."
        )


def compare(
    outputs: Iterable[Output],
    base: BaseModel,
    allowed: AllowedDifferences,
    spelling: Spelling,
    *,
    base_check: str = "strict",
    carry_unread: bool = False,
) -> Compatibility:
    """Compares `outputs`, spelled as in the base; pure but for a warning.

    Raises PlanError listing the names whose differences have no reason, unless `base_check` is `warn`.
    """
    ours = {o.name: o.shape for o in spelling.apply(outputs)}
    found: dict[str, list[str]] = {
        "named as in the base": list(spelling.names.values()),
        "held in the base as in memory": list(spelling.whole.values()),
    }
    wrong: dict[str, list[str]] = {"missing": [], "not in the base": [], "of another shape": []}
    unread = []

    def settle(reason: str | None, name: str, kind: str, text: str | None = None) -> None:
        kept = wrong[kind] if reason is None else found.setdefault(reason, [])
        kept.append(text or name if reason is None else name)

    for name in ours.keys() - base.tensors.keys():
        settle(allowed.added(name), name, "not in the base")
    for name in base.tensors.keys() - ours.keys():
        reason = allowed.lacking(name)
        if reason is None and not wrong["not in the base"] and (reason := allowed.unread(name)) is not None:
            unread.append(name)
        settle(reason, name, "missing")
    for name in ours.keys() & base.tensors.keys():
        shape, expected = ours[name], base.tensors[name].shape
        if shape != expected:
            reason = _SWAPPED if _swapped(shape) == expected else allowed.reshaped(shape, expected)
            settle(reason, name, "of another shape", f"{name} (base {list(expected)}, here {list(shape)})")
    if any(wrong.values()):
        return _refuse(base, wrong, base_check)
    explained = {why: tuple(sorted(names)) for why, names in sorted(found.items()) if names}
    transposed, left = frozenset(explained.get(_SWAPPED, ())), tuple(sorted(unread))
    return Compatibility(base, "", explained, transposed, spelling, left, left if carry_unread else ())


def _refuse(base: BaseModel, wrong: Mapping[str, Sequence[str]], base_check: str) -> Compatibility:
    lists = "; ".join(f"{kind}: {brief(sorted(names))}" for kind, names in wrong.items() if names)
    text = (
        f"the planned files differ from the base model {base.directory}: {lists}. Engines that serve the "
        "base would misread them."
    )
    if base_check != "warn":
        raise PlanError(
            f"{text} Is that the model that was trained, and its files as published? {_way_out('warn or off')}"
        )
    logger.warning("verl_autoexport: %s The export continues, since %s is warn.", text, _CHECK)
    return Compatibility(base, differs=lists)


def _way_out(value: str) -> str:
    return f"If it is, and you answer for it: {_CHECK}: {value}."


def apply_base(outputs: Iterable[Output], contract: Compatibility, dtype: str) -> list[Output]:
    """The `outputs` with the base's names, in its layout and, if `dtype` is `base`, in its dtypes."""
    base = contract.base
    check_dtype(dtype, base, contract.reason)
    outputs = contract.spelling.apply(outputs)
    if dtype == "base" and base is not None:
        outputs = [replace(o, dtype=_base_dtype(o, base)) for o in outputs]
    return [o.swapped if o.name in contract.transposed else o for o in outputs]


def carry(
    contract: Compatibility, manifest: ShardManifest, outputs: list[Output], dtype: str
) -> tuple[ShardManifest, list[Output]]:
    """The manifest and the outputs, each with the tensors carried over from the base.

    A tensor in the base's usual dtype gets the export's dtype, as the layers beside it have; one that
    the base stores in another dtype (scales, biases of routers) keeps it.
    """
    base = contract.base
    if base is None or not contract.carried:
        return manifest, outputs
    usual = base.usual_dtype
    outputs, tensors = list(outputs), {name: base.files.tensors[name] for name in contract.carried}
    for name, entry in tensors.items():
        if entry.dtype not in SAFETENSORS_DTYPE:
            raise PlanError(f"{base.directory}: {name}: its dtype {entry.dtype} is not supported; leave out {_CARRY}.")
        cast = entry.dtype if dtype in OWN_DTYPES or entry.dtype != usual else dtype
        outputs.append(Output(name, entry.shape, cast, whole(name, entry.shape)))
    return with_files(manifest, base.files, tensors), outputs


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
    """The shape with its last two dimensions swapped, for packed experts only; a swapped matrix is another matrix."""
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 2 else None


def _allowed_differences(
    skeleton: Skeleton, head: Head | None, base: BaseModel, own: Skeleton | None = None
) -> AllowedDifferences:
    """The differences to allow; `own` is the base's skeleton from its own configuration, if available."""
    name, head_weight = skeleton.name, skeleton.output_embeddings
    base_config = load_config(base.directory, skeleton.trust_remote_code, named=False)
    own_head = frozenset[str]()
    if head_weight is not None and not skeleton.tied and _ties(base_config):
        own_head = frozenset(reverse(skeleton, {head_weight: skeleton.tensors[head_weight]}))

    @cache
    def theirs() -> Skeleton:
        return own or _own_skeleton(skeleton, base)

    def lacking(key: str) -> str | None:
        if read_as(skeleton, key) in skeleton.tied:
            return "tied, written once"
        if head is not None and key in head.removed:
            return f"replaced by the head of {name}"
        return f"no part of {name}" if key in skeleton.unsaved or _MOVED_BUFFERS.search(key) else None

    def unread(key: str) -> str | None:
        if read_as(skeleton, key) is not None:
            return None
        return f"not read by {name}" if skeleton.optional(key) or read_as(theirs(), key) is None else None

    def added(key: str) -> str | None:
        if head is not None and key in head.added:
            return f"head of {name}"
        if key in own_head:
            return "untied from the embeddings"
        return f"{name} loads without it" if read_as(skeleton, key) and skeleton.optional(key) else None

    return AllowedDifferences(lacking, unread, added, (_vocabulary(base_config), _vocabulary(skeleton.config)))


def _own_skeleton(skeleton: Skeleton, base: BaseModel) -> Skeleton:
    """The base's skeleton from its own `config.json`; in the trained class if the one named there is not available."""
    try:
        return build_skeleton(base.directory, "source", skeleton.trust_remote_code)
    except PlanError:
        return TransformersSkeleton.of(base.directory, "source", skeleton.trust_remote_code, skeleton.name)


def _ties(config: Any) -> bool:
    return any(getattr(c, "tie_word_embeddings", False) for c in (config, config.get_text_config()))


def _vocabulary(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)

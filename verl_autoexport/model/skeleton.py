"""In-memory names → names on disk, by transformers' own rules on a skeleton without weights.

`save_pretrained` writes what `revert_weight_conversion` makes of the state dict
(transformers 5: packed experts are unpacked, prefixes renamed back). Here the same
function runs on meta tensors, so that the names are known before a byte is read.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import Output, whole
from verl_autoexport.model.conversion import trace
from verl_autoexport.shards.manifest import FLOATING, ShardManifest
from verl_autoexport.system.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OWN_DTYPES = ("source", "base")
"""Export dtypes that name no dtype: each tensor has its own."""
_COUNTS = re.compile(r"layers?$|blocks?$|depths?$|experts$|num_labels$|stages$")
_MOST = 100_000
"""Layers, experts and the like in a model; each becomes an object."""
_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification",
    "AutoModelForSequenceClassification", "AutoModel",
)  # fmt: skip
_KIND = re.compile(r"For[A-Z]\w*$|Model$|$")
"""The end of a class's name, which says what it is for."""
_TRUST = " Its code is in the checkpoint: set trust_remote_code (`--trust-remote-code`) if you trust it."


def load_config(directory: Path, trust_remote_code: bool = False, named: bool = True) -> PretrainedConfig:
    """The model's config from `directory/config.json`; raises PlanError naming the file."""
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise PlanError(f"{directory / 'config.json'}: not found; without it no model can be told from the shards.")
    _check_sizes(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as e:
        detail = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        hint = _TRUST if "custom code" in detail else ""
        raise PlanError(f"{directory / 'config.json'}: transformers cannot read it: {detail}{hint}") from e
    if not isinstance(getattr(config, "auto_map", None) or {}, Mapping):
        raise PlanError(f"{directory / 'config.json'}: auto_map={config.auto_map!r:.100}: expected an object.")
    if named and not config.architectures:
        raise PlanError(f"{directory / 'config.json'}: `architectures` is missing; expected the model class's name.")
    return config


def _check_sizes(path: Path) -> None:
    """A model on the meta device has no weights, but a layer is an object: a billion of them is no model."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as e:
        raise PlanError(f"{path}: cannot read it: {e}") from e
    nodes = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key, value in ((k, v) for node in nodes for k, v in node.items() if _COUNTS.search(k)):
        if any(isinstance(n, int) and n > _MOST for n in (value if isinstance(value, list) else [value])):
            raise PlanError(f"{path}: {key}={value!r:.100}: more than {_MOST}; this is no model that was trained.")


def model_class(config: PretrainedConfig, directory: Path, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that `architectures` names, from transformers or, if trusted, from the directory's own code."""
    import transformers

    name = architecture(config)
    auto_map = getattr(config, "auto_map", None) or {}
    remote = next((ref for ref in auto_map.values() if isinstance(ref, str) and ref.rpartition(".")[2] == name), None)
    if remote and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(remote, str(directory))
        except Exception as e:
            raise PlanError(f"{directory / 'config.json'}: its code {remote} cannot be loaded: {e}") from e
    cls = getattr(transformers, name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return _of_the_config(cls, config, directory)
    hint = _TRUST if remote else ""
    raise PlanError(
        f"{directory / 'config.json'}: architecture {name} is unknown to transformers {transformers.__version__}.{hint}"
    )


def _of_the_config(cls: type[PreTrainedModel], config: PretrainedConfig, directory: Path) -> type[PreTrainedModel]:
    """`cls`, or the class of its kind that `model_type` means: transformers loads that, engines `architectures`."""
    import transformers

    known = cls.config_class
    if known is None or isinstance(config, known) or known.model_type == config.model_type:
        return cls
    for auto in _AUTO_CLASSES:
        found = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if isinstance(found, type) and _KIND.search(found.__name__)[0] == _KIND.search(cls.__name__)[0]:
            return found
    raise PlanError(
        f"{directory / 'config.json'}: architectures names {cls.__name__}, whose model_type is {known.model_type!r}, "
        f"but model_type is {config.model_type!r}: correct the one that is wrong."
    )


def architecture(config: PretrainedConfig) -> str:
    """The name of the model's class."""
    return first_architecture(config.architectures)


def first_architecture(names: Sequence[Any]) -> str:
    """The first name in `architectures`, without the prefix that FSDP2 puts before a wrapped class's name."""
    return str(names[0]).removeprefix("FSDP")


def build_skeleton(
    directory: Path,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    external_lib: str | None = None,
    architecture: str | None = None,
    num_labels: int | None = None,
) -> PreTrainedModel:
    """The model on the meta device: names, shapes and conversion rules without memory for weights.

    `dtype` is the export dtype (`source` and `base` leave the config's own). `architecture`
    and `num_labels` override those of `config.json`. Raises PlanError where the model cannot
    be built.
    """
    if external_lib:
        for module in external_lib.split(","):
            importlib.import_module(module.strip())
    config = load_config(directory, trust_remote_code)
    if architecture is not None:
        config.architectures = [architecture]
    if num_labels is not None:
        config.num_labels = num_labels
    cls = model_class(config, directory, trust_remote_code)
    kwargs: dict[str, Any] = {"attn_implementation": "eager"}
    if dtype not in OWN_DTYPES:
        kwargs["dtype"] = config.dtype = getattr(torch, dtype)  # some classes read the one of the config
    try:
        with torch.device("meta"):
            return cls._from_config(config, **kwargs)
    except Exception as e:
        raise PlanError(
            f"{directory / 'config.json'}: {cls.__name__} cannot be built from it: {type(e).__name__}: {e}"
        ) from e


def name_outputs(skeleton: PreTrainedModel, manifest: ShardManifest, dtype: str) -> list[Output]:
    """What is written, in the order of `save_pretrained`; raises PlanError unless the model is whole.

    Tied aliases are dropped (equality of values is the planner's to check: see
    `tied_aliases`), `dtype` is applied to floating tensors only, and what transformers
    keeps in float32 for that dtype stays float32.
    """
    kept = _check_complete(skeleton, manifest)
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
            f"{type(skeleton).__name__}: transformers writes nothing of {_brief(lost)} on the way to disk; "
            "an export would lack what was trained."
        )
    return outputs


def class_outputs(skeleton: PreTrainedModel) -> list[Output]:
    """What a saved model of this class holds, tied aliases and ignored keys left out, in the skeleton's dtypes."""
    ignored = (getattr(skeleton, "all_tied_weights_keys", None) or {}).keys() | set(
        skeleton._keys_to_ignore_on_save or ()
    )
    state = {k: v for k, v in skeleton.state_dict().items() if k not in ignored}
    metas = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in state.items()}
    return trace(partial(reverse, skeleton), metas)


def model_dtype(skeleton: PreTrainedModel, manifest: ShardManifest, dtype: str) -> str:
    """What transformers calls the dtype of the model exported in `dtype`: that of its first floating parameter."""
    rule = DtypeRule(skeleton, dtype)
    held = (
        (name, manifest.tensors[name].value_dtype)
        for name, _ in skeleton.named_parameters()
        if name in manifest.tensors
    )
    return next(rule(name, source) for name, source in held if source in FLOATING)


def tied_aliases(skeleton: PreTrainedModel, manifest: ShardManifest) -> dict[str, str]:
    """{alias: name it is tied to} of the aliases that the shards hold too; only the latter is written."""
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return {a: b for a, b in tied.items() if a in manifest.tensors and b in manifest.tensors}


def _check_complete(skeleton: PreTrainedModel, manifest: ShardManifest) -> list[str]:
    name = type(skeleton).__name__
    state = skeleton.state_dict()
    expected = {k: tuple(v.shape) for k, v in state.items()}
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
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
    """Which key of `config.json` contradicts the shards, as far as they tell."""
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


class DtypeRule:
    """Output dtype of a tensor by its in-memory name, as `from_pretrained(dtype=…)` would load it.

    `skeleton` must have been built in `dtype`: what a class creates in a dtype of its own keeps that.
    """

    def __init__(self, skeleton: PreTrainedModel, dtype: str) -> None:
        self.dtype = dtype
        self.fp32: re.Pattern[str] | None = None
        self.built: dict[str, str] = {}
        if dtype in OWN_DTYPES:
            return
        self.built = {k: str(v.dtype).removeprefix("torch.") for k, v in skeleton.state_dict().items()}
        if plan := skeleton._get_dtype_plan(getattr(torch, dtype)):
            from transformers.core_model_loading import build_glob_alternation

            self.fp32 = build_glob_alternation(list(plan))[0]

    def __call__(self, fqn: str, source: str) -> str:
        if source not in FLOATING or self.dtype in OWN_DTYPES:
            return source
        if self.fp32 and self.fp32.search(fqn):
            return "float32"
        built = self.built.get(fqn, self.dtype)
        return built if built in FLOATING else self.dtype


def in_dtype(skeleton: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The same skeleton as if it had been built in `dtype`."""
    config = deepcopy(skeleton.config)
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        return type(skeleton)._from_config(config, dtype=config.dtype, attn_implementation="eager")


def reverse(skeleton: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' own way back from in-memory tensors to those on disk; raises PlanError if it cannot."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(skeleton, dict(tensors))
    except Exception as e:
        raise PlanError(
            f"{type(skeleton).__name__}: transformers cannot convert {_brief(tensors)} back to names on disk: {e}"
        ) from e


class Loading:
    """Where `from_pretrained` puts what it finds in files, by its name there; nothing is loaded.

    The names in files may lack the base model's prefix or have one too many, and be those of
    an older class: transformers renames them, and so it is asked here.
    """

    def __init__(self, skeleton: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        mapping = get_model_conversion_mapping(skeleton)
        self.converters = [t for t in mapping if isinstance(t, WeightConverter)]
        self.renamings = [t for t in mapping if not isinstance(t, WeightConverter)]
        self.state = skeleton.state_dict()
        self.prefix = skeleton.base_model_prefix
        self.rename = rename_source_key

    def place(self, name: str) -> tuple[str, str | None]:
        """The in-memory name, and the pattern of the conversion that the tensor is a part of, if any."""
        found = self.rename(name, self.renamings, self.converters, self.prefix, self.state)
        if found[0] not in self.state and name in self.state:
            found = self.rename(name, [], [], self.prefix, self.state)
        return found

    def parameter(self, name: str) -> str | None:
        """The in-memory tensor that it becomes, or becomes a part of; None where the class reads no such tensor."""
        found = self.place(name)[0]
        return found if found in self.state else None

    def unexpected(self, name: str) -> set[str]:
        """What transformers calls it in its report, if the class does not read it."""
        found, pattern = self.place(name)
        converter = next((c for c in self.converters if pattern in c.source_patterns), None)
        targets = converter.target_patterns if converter else ()
        return {found, *(found.replace(targets[0], target) for target in targets)}


@dataclass(frozen=True)
class Spelling:
    """How other files name what a class writes: nothing else than transformers loads as the same tensors.

    `names`: ours → theirs. `whole`: in-memory names of tensors that they hold as they are in
    memory, where transformers would write parts of them or several in one → theirs; `shapes` are those.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def apply(self, outputs: Iterable[Output]) -> list[Output]:
        """`outputs` as those files hold them."""
        made: dict[str, Output] = {}
        for output in outputs:
            parts = [p for p in output.pieces if p.fqn in self.whole]
            made |= {} if parts else {output.name: replace(output, name=self.names.get(output.name, output.name))}
            for fqn in (p.fqn for p in parts if self.whole[p.fqn] not in made):
                shape = self.shapes[fqn]
                made[self.whole[fqn]] = Output(self.whole[fqn], shape, output.dtype, whole(fqn, shape))
        return list(made.values())


def spell(skeleton: PreTrainedModel, outputs: Sequence[Output], theirs: Collection[str]) -> Spelling:
    """How files with the names `theirs` spell what is not among them of `outputs`."""
    ours = {o.name: o for o in outputs if o.name not in theirs}
    only_theirs = set(theirs) - {o.name for o in outputs}
    if not ours or not only_theirs:
        return Spelling()
    loading, tied = Loading(skeleton), getattr(skeleton, "all_tied_weights_keys", None) or {}

    def placed(names: Iterable[str]) -> dict[tuple[str, str | None], list[str]]:
        places = defaultdict(list)
        for name in sorted(names, key=_natural):  # the order in which transformers stacks the parts of a tensor
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


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _brief(names: Iterable[str]) -> str:
    names = list(names)
    return "none" if not names else ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")

"""The configuration and the class of a model directory, as transformers knows them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.errors import PlanError
from verl_autoexport.system.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_COUNTS = re.compile(r"layers?$|blocks?$|depths?$|experts$|num_labels$|stages$")
_MOST = 100_000
"""The limit on layers, experts and the like in a model; each becomes an object."""
_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification",
    "AutoModelForSequenceClassification", "AutoModel",
)  # fmt: skip
_KIND = re.compile(r"For[A-Z]\w*$|Model$")
"""The end of a class's name, which shows its task."""
_TRUST = " Its code is in the checkpoint: set trust_remote_code (`--trust-remote-code`) if you trust it."


def load_config(directory: Path, trust_remote_code: bool = False, named: bool = True) -> PretrainedConfig:
    """The model's config from `directory/config.json`; raises PlanError naming the file."""
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise PlanError(f"{directory / 'config.json'}: not found; without it the model of the shards is unknown.")
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
    """Refuses impossible numbers: on the meta device weights take no memory, but each layer is an object."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as e:
        raise PlanError(f"{path}: cannot read it: {e}") from e
    nodes = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key, value in ((k, v) for node in nodes for k, v in node.items() if _COUNTS.search(k)):
        if any(isinstance(n, int) and n > _MOST for n in (value if isinstance(value, list) else [value])):
            raise PlanError(f"{path}: {key}={value!r:.100}: more than {_MOST}; this is no model that was trained.")


def load_class(directory: Path, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class of the model in `directory`; raises PlanError."""
    return model_class(load_config(directory, trust_remote_code), directory, trust_remote_code)


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
    """The class of `cls`'s kind that `model_type` means: transformers loads that one, engines `architectures`."""
    import transformers

    known = cls.config_class
    if known is None or isinstance(config, known) or known.model_type == config.model_type:
        return cls
    for auto in _AUTO_CLASSES:
        found = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if isinstance(found, type) and _kind(found) == _kind(cls):
            return found
    raise PlanError(
        f"{directory / 'config.json'}: architectures names {cls.__name__}, whose model_type is {known.model_type!r}, "
        f"but model_type is {config.model_type!r}: correct the one that is wrong."
    )


def _kind(cls: type) -> str:
    return match[0] if (match := _KIND.search(cls.__name__)) else ""


def architecture(config: PretrainedConfig) -> str:
    """The name of the model's class; raises PlanError if the configuration has none."""
    if not config.architectures:
        raise PlanError("`architectures` is missing in the model's configuration; expected the model class's name.")
    return first_architecture(config.architectures)


def first_architecture(names: Sequence[Any]) -> str:
    """The first name in `architectures`, without the prefix that FSDP2 puts before a wrapped class's name."""
    return str(names[0]).removeprefix("FSDP")

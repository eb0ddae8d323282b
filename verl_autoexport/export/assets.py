"""Everything of a model directory but its weights: config, generation config, tokenizer, processor, code."""

from __future__ import annotations

import fnmatch
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from verl_autoexport.export.base import BaseModel
from verl_autoexport.export.configs import set_values, write_base_config
from verl_autoexport.export.naming import architecture
from verl_autoexport.export.peft_config import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")

_BASE_ASSETS = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*processor*_config.json", "processor_config.json", "spiece.model", "*.tiktoken", "tekken.json",
    "sentencepiece*.model", "*.py",
)  # fmt: skip


def write_config(
    skeleton: PreTrainedModel,
    dtype: str | None,
    target: Path,
    base: BaseModel | None = None,
    trust_remote_code: bool = False,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """`config.json` for the model in `dtype` (torch's name without `torch.`); returns notes.

    With a `base` it is the base's own file with what changed, else as `save_pretrained`
    would write it. `dtype` None: each tensor has that of the base, and so has the file. `values`, by
    dotted key, replace the trained model's.
    """
    config = skeleton.config
    set_values(config, values)
    config.dtype = dtype or base.usual_dtype  # nested ones were set when the skeleton was built
    config.architectures = [architecture(config)]
    config.save_pretrained(target)
    if base is None:
        return []
    key = write_base_config(config, architecture(config), dtype, base, target, trust_remote_code)
    style = "config.json is written as this transformers writes it, not as the base model's file"
    return [f"{style}: that one cannot say {key} as trained"] if key else []


def model_files(module: Any, tokenizer: Any) -> dict[str, bytes]:
    """What verl saves beside a checkpoint's shards, by path: the contents of config, tokenizer or processor, adapter.

    As in `fsdp_checkpoint_manager.py` (verl 0.9.1), which makes the generation config of the base model's.
    """
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "huggingface"
        if auto_map := getattr(module.config, "auto_map", None):
            module.config.auto_map = {k: v for k, v in auto_map.items() if k is not None}
        module.config.save_pretrained(beside)
        if auto_map:
            base = module.get_base_model() if hasattr(module, "get_base_model") else module
            custom_object_save(base, beside, config=module.config)
        if module.can_generate() and module.config.name_or_path:
            with suppress(OSError, ValueError):  # it has none
                GenerationConfig.from_pretrained(module.config.name_or_path).save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if adapter := (getattr(module, "peft_config", None) or {}).get("default"):
            adapter.save_pretrained(folder)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def copy_base_assets(base: BaseModel, target: Path, generates: bool) -> None:
    """Copy the base's tokenizer, processor, generation config and code: what the run did not save over it."""
    for path in sorted(p for p in base.directory.iterdir() if p.is_file()):
        if path.name == "generation_config.json" and not generates:
            continue
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _BASE_ASSETS):
            shutil.copyfile(path, target / path.name)


def copy_assets(source: Path, target: Path) -> list[str]:
    """Copy the trained run's own files, sub-directories included; returns notes on what is not there.

    Symbolic links are left out: a checkpoint directory is not trusted.
    """
    for path in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
        relative = path.relative_to(source)
        ours = path.name.endswith(_WEIGHTS) or relative in (Path("config.json"), Path(CONFIG_NAME))
        if ours or relative.parts[0] == ".cache":
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
    return _notes(target)


def _notes(target: Path) -> list[str]:
    notes = []
    if not any((target / name).is_file() for name in _TOKENIZER):
        notes.append("no tokenizer: the run saved none, so this version has none; add the base model's to serve it")
    if not (target / "generation_config.json").is_file():
        notes.append("no generation config: the run saved none; engines use their defaults")
    return notes

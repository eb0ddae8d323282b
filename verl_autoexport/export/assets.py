"""Everything of a model directory but its weights: config, generation config, tokenizer, processor, code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from verl_autoexport.export.naming import architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


def write_config(skeleton: PreTrainedModel, dtype: str, target: Path) -> None:
    """`config.json` as `save_pretrained` would write it for the model in `dtype` (torch's name without `torch.`)."""
    config = skeleton.config
    config.dtype = dtype  # nested ones were set when the skeleton was built
    config.architectures = [architecture(config)]
    config.save_pretrained(target)


def copy_assets(source: Path, target: Path) -> list[str]:
    """Copy the trained run's own files, sub-directories included; returns notes on what is not there.

    Symbolic links are left out: a checkpoint directory is not trusted.
    """
    for path in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
        relative = path.relative_to(source)
        if path.name.endswith(_WEIGHTS) or relative == Path("config.json") or relative.parts[0] == ".cache":
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

"""Tokenizers and processors in several styles, and what is written of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.support.published import SMALL, START, TEMPLATE, make_tokenizer, write_json
from verl_autoexport.export.assets import Reference, write_assets

IMAGE = {
    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
}  # fmt: skip
PROCESSOR = {"processor_class": "LlavaProcessor", "patch_size": 14, "image_token": START}
STYLES = {
    "qwen": {"kind": "Qwen2Tokenizer"},
    "llama": {"kind": "PreTrainedTokenizerFast", "bos": START},
    "llama 2": {"kind": "LlamaTokenizer", "bos": START, "add_bos_token": True, "add_eos_token": False},
}


def make_processor(directory: Path, own_template: str | None = TEMPLATE, **settings: Any) -> Path:
    """A processor as the hub has it: a tokenizer with `settings`, an image processor, and `own_template` of the two."""
    make_tokenizer(directory, **settings)
    write_json(directory / "config.json", {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    write_json(directory / "preprocessor_config.json", IMAGE)
    write_json(directory / "processor_config.json", PROCESSOR)
    if own_template is not None:
        write_json(directory / "chat_template.json", {"chat_template": own_template})
    return directory


def put(files: Path, target: Path, base: Path | None = None) -> tuple[list[str], Reference]:
    """`write_assets` of a run's directory into a `target` that has the config.json of the run's."""
    target.mkdir()
    if not (files / "config.json").exists():
        write_json(files / "config.json", SMALL)
    shutil.copyfile(files / "config.json", target / "config.json")
    return write_assets(files, base, target)

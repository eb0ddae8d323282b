"""Files beside the shards: those that are published with the model, and those that say how the shards are read."""

from __future__ import annotations

import os
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.system.untrusted import leads_out

_PUBLISHED = ("huggingface", "huggingface/config.json", "huggingface/adapter_config.json", "adapter_config.json",
              "lora_train_meta.json", "lora_adapter/adapter_config.json")  # fmt: skip


def check_links(checkpoint: Path) -> None:
    """Raises SourceError if a published file beside a checkpoint's weights is a link out of the checkpoint.

    A step's directory, or its `actor/`, may itself be a link, and rank files may be gathered by links.
    """
    inside = checkpoint.parent if checkpoint.parent.name.startswith("global_step_") else checkpoint
    root = inside if not leads_out(checkpoint, inside) else checkpoint
    for path in (checkpoint / name for name in _PUBLISHED):
        if leads_out(path, root):
            raise SourceError(
                f"{path}: leads to {os.path.realpath(path)}, which is outside of the checkpoint; that content "
                "would be published with the model. Copy it into the checkpoint."
            )


def settings_files(directory: Path) -> list[Path]:
    """The small files beside the shards themselves, such as `fsdp_config.json` and `lora_train_meta.json`."""
    return sorted(
        path for found in ("*.json", "lora_adapter/*.json") for path in directory.glob(found) if path.is_file()
    )

"""Finds Hugging Face weights that verl itself wrote into a step, and says whether their save is complete. No torch.

FSDP with `hf_model`, and Megatron up to verl 0.8, write `huggingface/*.safetensors` into a role's directory. Megatron
from verl 0.9 on writes `model/huggingface/`, and `ckpt_contents.json` beside `model/` as the last file of a save.
A directory of this format is the one that holds `huggingface/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.safetensors_files import INDEX_NAME, weight_files
from verl_autoexport.sources.fsdp.discovery import STEP, candidates, has_shards
from verl_autoexport.system.untrusted import read_json

FOLDER, NESTED, CONTENTS = "huggingface", "model", "ckpt_contents.json"
_MEGATRON = "dist_ckpt"
_ADAPTERS = (f"{FOLDER}/adapter", "adapter_checkpoint")
"""Where verl's Megatron saves LoRA; the second until verl 0.7.1."""
_ONLY_ADAPTER = (
    "the run trained LoRA with Megatron, of which verl saves only the adapter: the weights in {folder}/, if there are "
    "any, are the untrained base model's. Such a checkpoint is not exported; load the adapter with PEFT."
)


def find_weights(path: Path, role: str) -> Path | None:
    """The directory whose `huggingface/` holds the weights of `role`: `path`, or one in it; None if there is none.

    Also None where rank files are: they have the dtype of training. Raises SourceError if several places hold weights.
    """
    try:
        if any(map(has_shards, candidates(path, role))):
            return None
        found = [place for place in _places(path, role) if has_weights(place) or _adapter(place)]
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}.") from e
    if len(found) > 1:
        raise SourceError(f"{path}: {found[0] / FOLDER} and {found[1] / FOLDER} both hold weights; name one of them.")
    return found[0] if found else None


def _places(path: Path, role: str) -> Iterator[Path]:
    for place in candidates(path, role):
        yield from (place, place / NESTED)


def has_weights(place: Path) -> bool:
    """Whether files of Hugging Face weights lie in `huggingface/` of `place`."""
    folder = place / FOLDER
    return folder.is_dir() and any(name.endswith((".safetensors", INDEX_NAME)) for name in os.listdir(folder))


def holds_weights(step: Path, role: str) -> bool:
    """Whether a step has Hugging Face weights of `role`, in either layout."""
    return any(map(has_weights, _places(step, role)))


def _adapter(place: Path) -> Path | None:
    """The LoRA adapter beside, or in place of, the weights of `place`."""
    return next((place / name for name in _ADAPTERS if (place / name).is_dir() and os.listdir(place / name)), None)


def remains(path: Path, role: str) -> str:
    """A sentence about other files of a checkpoint from which nothing can be exported; empty if there are none."""
    for place in _places(path, role):
        if old := sorted((place / FOLDER).glob("pytorch_model*.bin")):
            return f"There is {old[0]}, but only safetensors are read."
        if (place / _MEGATRON).is_dir():
            return (
                f"There is Megatron's own format in {place / _MEGATRON}, which is not read: save with "
                "megatron.use_mbridge=True and megatron.use_dist_checkpointing=False, or add 'hf_model' to "
                "checkpoint.save_contents."
            )
    if path.name == FOLDER and any(path.glob("*.safetensors")):
        return f"The weights here are those of {path.parent}; give that."
    return ""


def weight_paths(directory: Path) -> list[Path]:
    """The weight files of a complete save; raises SourceError if it is incomplete, or not the whole model."""
    if adapter := _adapter(directory):
        raise SourceError(f"{adapter}: {_ONLY_ADAPTER.format(folder=FOLDER)}")
    if directory.name == NESTED:
        _check_contents(directory.parent / CONTENTS)
    folder = directory / FOLDER
    files, index = weight_files(folder), folder / INDEX_NAME
    if not files:
        raise SourceError(f"{folder}: no model.safetensors and no {INDEX_NAME}; the save was interrupted.")
    if files[0].name == "model.safetensors" and index.is_file() and _named(index) != {files[0].name}:
        raise SourceError(
            f"{index}: it names other files than model.safetensors, which lies beside it: two saves wrote here. Remove "
            "the files of the older one."
        )
    if lost := [path.name for path in files if not path.is_file()]:
        raise SourceError(
            f"{folder / lost[0]}: missing, but {INDEX_NAME} names it ({len(lost)} of {len(files)} are missing): "
            "the save was interrupted, or not all files were copied."
        )
    return files


def _named(index: Path) -> set[str]:
    return set(weight_map(index).values())


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by the index; raises SourceError."""
    try:
        found = read_json(index)["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("weight_map is no mapping of names to files")
    except (OSError, ValueError, KeyError) as e:
        raise SourceError(f"{index}: its weight_map cannot be read: {e!r}") from e
    return found


def _check_contents(path: Path) -> None:
    """Raises SourceError unless verl's list of a save's contents is there and has the whole model in `huggingface`."""
    try:
        said = read_json(path)
    except FileNotFoundError:
        raise SourceError(
            f"{path}: not there. verl writes it as the last file of a save, so this save is not complete: it was "
            "interrupted, or is still under way."
        ) from None
    except (OSError, ValueError) as e:
        raise SourceError(f"{path}: cannot be read: {e}") from e
    contents, backend = said.get("contents"), said.get("backend")
    if isinstance(backend, dict) and backend.get("peft"):
        raise SourceError(f"{path}: backend.peft is true: {_ONLY_ADAPTER.format(folder=FOLDER)}")
    wanted = {"path": f"{NESTED}/{FOLDER}", "format": "huggingface"}
    entries = [contents.get(key) for key in ("model", "hf_model")] if isinstance(contents, dict) else []
    if not any(isinstance(entry, dict) and wanted.items() <= entry.items() for entry in entries):
        raise SourceError(f"{path}: it lists no Hugging Face weights in {NESTED}/{FOLDER}; they are not of this save.")


def step_directory(directory: Path) -> Path:
    """The `global_step_N` of a directory of this format; the directory itself if it is in none."""
    above = (directory, *directory.absolute().parents[:2])
    return next((path for path in above if STEP.fullmatch(path.name)), directory)

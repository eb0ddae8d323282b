"""The base model that a run starts from, as its files describe it: tensor headers, config, tokenizer.

Reads no weights and needs no torch. A base is usable as a directory with safetensors, or as a
model in the Hugging Face cache; for anything else one line gives the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_autoexport.errors import PlanError, SourceError
from verl_autoexport.shards.manifest import FLOATING, ShardManifest, TensorEntry
from verl_autoexport.shards.safetensors_files import INDEX_NAME, model_files, weight_files
from verl_autoexport.system.untrusted import read_json


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base: its shape, and its dtype by torch's name (safetensors' name if torch has none)."""

    shape: tuple[int, ...]
    dtype: str


_PREDICTED = re.compile(r"\w*(nextn|mtp)\w*_(layers|modules)|n_predict|num_mtp")
_WITHOUT = (
    "names are not compared with its tensors, config.json is written in this transformers' style, and none of "
    "its tokenizer files can be used"
)


@dataclass(frozen=True)
class BaseModel:
    """A base model's directory, its tensors by name on disk, its `config.json`, and the place of its tensors' bytes."""

    directory: Path
    tensors: Mapping[str, BaseTensor]
    config: Mapping[str, Any]
    files: ShardManifest

    @property
    def usual_dtype(self) -> str:
        """The floating dtype of most tensors, which tensors that the base lacks get."""
        counted = Counter(t.dtype for t in self.tensors.values() if t.dtype in FLOATING)
        return counted.most_common(1)[0][0] if counted else "float32"

    @property
    def predicting(self) -> dict[str, int]:
        """{dotted key of `config.json`: number} of layers for multi-token prediction, if there are any."""
        found = _leaves(self.config)
        return {key: value for key, value in found if counts_predicting(key) and type(value) is int and value > 0}


def counts_predicting(key: str) -> bool:
    """Whether a (dotted) key of a configuration counts the layers for multi-token prediction; no class reads those."""
    return _PREDICTED.fullmatch(key.rpartition(".")[2]) is not None


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def find_base(path: str | None) -> tuple[BaseModel | None, str]:
    """The base model at `path`; or None and the reason why a comparison is impossible.

    Raises PlanError if the base model is damaged.
    """
    if not path:
        return None, "no base model was given"
    directory = base_directory(path)
    if directory is None:
        return None, f"the base model {path} is no local directory, nor in the Hugging Face cache here: {_WITHOUT}"
    cached = not Path(path).expanduser().is_dir()
    try:
        if not (files := weight_files(directory)):
            return None, f"the base model {directory} has no model.safetensors and no {INDEX_NAME}: {_WITHOUT}"
        if not (directory / "config.json").is_file():
            return None, f"the base model {directory} has no config.json: {_WITHOUT}"
        if cached and (lost := [f.name for f in files if not f.is_file()]):
            return None, f"the base model {path} is in the Hugging Face cache without {brief(lost)}: {_WITHOUT}"
        config = _read_config(directory)
        if config.get("quantization_config"):
            return None, f"the base model {directory} is quantized; its tensors are not those of training"
        held = model_files(directory)
    except (SourceError, TypeError) as e:
        raise PlanError(f"the base model {directory} is damaged: {type(e).__name__}: {e}") from e
    tensors = {name: BaseTensor(t.shape, t.dtype) for name, t in held.tensors.items()}
    return BaseModel(directory, tensors, config, held), ""


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        return read_json(path)
    except (OSError, ValueError) as e:
        raise SourceError(f"{path}: not readable as JSON: {e}") from e


def base_directory(base_model: str | None) -> Path | None:
    """The directory of the base model on this machine, even for an id on the hub; None if there is none."""
    if not base_model:
        return None
    with suppress(RuntimeError):  # `~nobody`
        if (path := Path(base_model).expanduser()).is_dir():
            return path.absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base_model, local_files_only=True))
    except Exception:  # noqa: BLE001 - not in the cache, or no such id: many classes mean the same here
        return None


def with_files(manifest: ShardManifest, disk: ShardManifest, tensors: Mapping[str, TensorEntry]) -> ShardManifest:
    """The `manifest` with `tensors` too, whose shards are in the files of `disk`."""
    moved = {
        name: replace(entry, shards=tuple(replace(s, file=s.file + len(manifest.files)) for s in entry.shards))
        for name, entry in tensors.items()
    }
    return replace(manifest, files=(*manifest.files, *disk.files), tensors={**manifest.tensors, **moved})


def brief(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a long list, for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")

"""The base model that a run starts from, as far as its files tell: tensor headers, config, tokenizer.

Reads no weights and needs no torch. What is at hand is a local directory with safetensors;
anything else is told in one line and not guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_autoexport.errors import PlanError, SourceError, VerifyError
from verl_autoexport.export.verify import read_json
from verl_autoexport.sources.base import FLOATING
from verl_autoexport.sources.safetensors_files import INDEX_NAME, model_files, weight_files


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base: shape, and dtype by torch's name (safetensors' own where torch's is unknown)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class BaseModel:
    """A base model's directory, its tensors by name on disk, and its `config.json`."""

    directory: Path
    tensors: Mapping[str, BaseTensor]
    config: Mapping[str, Any]

    @property
    def usual_dtype(self) -> str:
        """The floating dtype that most tensors have: that of a tensor which the base does not have."""
        counted = Counter(t.dtype for t in self.tensors.values() if t.dtype in FLOATING)
        return counted.most_common(1)[0][0] if counted else "float32"


def find_base(path: str | None) -> tuple[BaseModel | None, str]:
    """The base model at `path`; or None and the reason why there is none to compare with.

    Raises PlanError where there is one and it is damaged.
    """
    if not path:
        return None, "no base model was given"
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return None, f"the base model {path} is no local directory"
    try:
        if not weight_files(directory):
            return None, f"the base model {directory} has no model.safetensors and no {INDEX_NAME}"
        if not (directory / "config.json").is_file():
            return None, f"the base model {directory} has no config.json"
        config = read_json(directory / "config.json")
        if "quantization_config" in config:
            return None, f"the base model {directory} is quantized; its tensors are not those of training"
        held = model_files(directory).tensors
    except (SourceError, VerifyError, TypeError) as e:
        raise PlanError(f"the base model {directory} is damaged: {type(e).__name__}: {e}") from e
    return BaseModel(directory, {name: BaseTensor(t.shape, t.dtype) for name, t in held.items()}, config), ""


def brief(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a long list, for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")

"""Hugging Face weights that verl wrote into a checkpoint, as one of the formats."""

from __future__ import annotations

from pathlib import Path

from verl_autoexport.sources.hf_model.discovery import find_weights
from verl_autoexport.sources.protocol import SecondReading, ShardSource


class HfModelFormat:
    """The format `huggingface/*.safetensors`; torch is imported only when needed."""

    def find(self, path: Path, role: str) -> Path | None:
        return find_weights(path, role)

    def open(self, directory: Path) -> ShardSource:
        from verl_autoexport.sources.hf_model.weights import HfWeights

        return HfWeights(directory)

    def files(self, directory: Path) -> list[Path]:
        from verl_autoexport.sources.hf_model.weights import HfWeights

        return HfWeights(directory).files

    def read_again(self, directory: Path) -> SecondReading:
        from verl_autoexport.sources.hf_model.weights import read_again

        return read_again(directory)

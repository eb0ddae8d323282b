"""FSDP's checkpoints as one of the formats."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp.discovery import find_checkpoint, rank_files
from verl_autoexport.sources.protocol import SecondReading, ShardSource


class FsdpFormat:
    """The format `model_world_size_W_rank_R.pt`; torch is imported only when needed."""

    def find(self, path: Path, role: str) -> Path | None:
        with suppress(SourceError):  # whoever finds no format at all says why
            return find_checkpoint(path, role)
        return None

    def open(self, directory: Path) -> ShardSource:
        from verl_autoexport.sources.fsdp.rank_files import FsdpFiles

        return FsdpFiles(directory)

    def files(self, directory: Path) -> list[Path]:
        return rank_files(directory)

    def read_again(self, directory: Path) -> SecondReading:
        from verl_autoexport.sources.fsdp.second_reading import read_again

        return read_again(directory)

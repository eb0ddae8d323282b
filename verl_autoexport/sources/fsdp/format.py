"""FSDP's checkpoints as one of the formats."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from verl_autoexport.sources.fsdp.discovery import candidates, find_checkpoint, has_shards, rank_files
from verl_autoexport.sources.protocol import SecondReading, ShardSource

_BESIDE = ("fsdp_config.json", "lora_train_meta.json", "adapter_config.json")


class FsdpFormat:
    """The format `model_world_size_W_rank_R.pt`; torch is imported only when needed."""

    def find(self, path: Path, role: str) -> Path | None:
        with suppress(OSError):
            if any(map(has_shards, candidates(path, role))):
                return find_checkpoint(path, role)
        return None

    def open(self, directory: Path) -> ShardSource:
        from verl_autoexport.sources.fsdp.rank_files import FsdpFiles

        return FsdpFiles(directory)

    def files(self, directory: Path) -> list[Path]:
        return [*rank_files(directory), *beside(directory)]

    def read_again(self, directory: Path) -> SecondReading:
        from verl_autoexport.sources.fsdp.second_reading import read_again

        return read_again(directory)


def beside(directory: Path) -> list[Path]:
    """The existing small files that say how to read the shards in `directory`."""
    return [path for name in _BESIDE if (path := directory / name).is_file()]

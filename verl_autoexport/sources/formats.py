"""Which format a checkpoint has: the only module that knows all of them. Register another one here."""

from __future__ import annotations

from pathlib import Path

from verl_autoexport.sources.fsdp.discovery import find_checkpoint
from verl_autoexport.sources.fsdp.format import FsdpFormat
from verl_autoexport.sources.protocol import CheckpointFormat, ShardSource

FORMATS: list[CheckpointFormat] = [FsdpFormat()]


def find_shards(path: Path, role: str = "actor") -> Path:
    """The directory with the shards of `role` in a checkpoint; SourceError says what was looked for, and where."""
    return _look(path, role)[0]


def open_source(path: Path, role: str = "actor") -> ShardSource:
    """The checkpoint at `path`, in whatever format it is; raises SourceError."""
    directory, format_ = _look(path, role)
    return format_.open(directory)


def format_of(directory: Path) -> CheckpointFormat:
    """The format of the shards that lie directly in `directory`; raises SourceError."""
    return _look(directory, "actor")[1]


def _look(path: Path, role: str) -> tuple[Path, CheckpointFormat]:
    for format_ in FORMATS:
        if (found := format_.find(path, role)) is not None:
            return found, format_
    return find_checkpoint(path, role), FORMATS[0]  # its error says what is there instead

"""The choice of a checkpoint's format: the only module that knows all of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp.discovery import find_checkpoint
from verl_autoexport.sources.fsdp.format import FsdpFormat
from verl_autoexport.sources.hf_model.discovery import remains
from verl_autoexport.sources.hf_model.format import HfModelFormat
from verl_autoexport.sources.protocol import CheckpointFormat, ShardSource
from verl_autoexport.system.plugins import load

GROUP = "verl_autoexport.formats"
"""The entry points through which other packages add formats."""


@cache
def known_formats() -> tuple[CheckpointFormat, ...]:
    """The formats, ours first. Raises ConfigError if one of another package cannot be used."""
    return (FsdpFormat(), HfModelFormat(), *load(GROUP))


def find_shards(path: Path, role: str = "actor") -> Path:
    """The directory with the shards of `role` in a checkpoint; SourceError says what was looked for, and where."""
    return locate(path, role)[0]


def open_source(path: Path, role: str = "actor") -> ShardSource:
    """The checkpoint at `path`, in whatever format it is; raises SourceError."""
    directory, format_ = locate(path, role)
    return format_.open(directory)


def format_of(directory: Path) -> CheckpointFormat:
    """The format of the shards that lie directly in `directory`; raises SourceError."""
    return locate(directory, "actor")[1]


def locate(path: Path, role: str = "actor") -> tuple[Path, CheckpointFormat]:
    """The directory with the shards of `role` in a checkpoint, and their format; raises SourceError."""
    for format_ in known_formats():
        if (found := format_.find(path, role)) is not None:
            return found, format_
    try:
        return find_checkpoint(path, role), known_formats()[0]  # its error names the files that are there
    except SourceError as e:
        if not (more := remains(path, role)):
            raise
        raise SourceError(f"{e} {more}") from e

"""The seam for sources: the origin of weights, and the formats of checkpoint directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from verl_autoexport.shards.checksums import Run
from verl_autoexport.shards.manifest import ShardManifest

if TYPE_CHECKING:
    import torch


class ShardSource(Protocol):
    """A checkpoint, or a snapshot of running workers, as a manifest of byte ranges. All methods raise SourceError.

    `kind` is `checkpoint` or `live`; `directory` holds `huggingface/`, the model's configuration;
    `fingerprint` identifies the content.
    """

    @property
    def kind(self) -> str: ...

    @property
    def directory(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...

    def manifest(self) -> ShardManifest:
        """All shards and where their bytes lie; reads metadata only."""
        ...

    def verify_checksums(self, manifest: ShardManifest, runs: Sequence[Run], progress: Callable[[int], None]) -> None:
        """Raises unless every byte has the checksum in `manifest`, and the bytes of `runs` are those that were read.

        `progress` gets the bytes compared.
        """
        ...

    def check_unchanged(self) -> None:
        """Raises unless the source is unchanged since `manifest` was read."""
        ...

    def drop_cache(self) -> None:
        """Removes the source from the page cache, as far as possible; raises nothing."""
        ...


Leaf = Callable[["torch.Tensor", "torch.Tensor"], object]
"""Receives, for one shard, its place in a tensor and its values; the result is ignored."""
Visit = Callable[["torch.Tensor", Leaf], None]
"""Calls a Leaf for every shard of one tensor; the first argument is the tensor that the shards fill."""


@dataclass(frozen=True)
class SecondReading:
    """The shards, read by a path that shares nothing with the merge, by their names in the shards.

    `empty` has a tensor on the meta device of each one's shape and dtype.
    """

    tensors: Mapping[str, Visit]
    empty: Mapping[str, torch.Tensor]


class CheckpointFormat(Protocol):
    """One kind of checkpoint on disk. All methods raise SourceError for a damaged checkpoint."""

    def find(self, path: Path, role: str) -> Path | None:
        """The directory with the shards of `role`: `path` itself, or one in it; None if it has another format."""
        ...

    def open(self, directory: Path) -> ShardSource:
        """The source in a directory that `find` returned."""
        ...

    def files(self, directory: Path) -> list[Path]:
        """All files that hold shards."""
        ...

    def read_again(self, directory: Path) -> SecondReading:
        """The shards for verification, read in another way than `open` reads them."""
        ...

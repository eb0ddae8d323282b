"""One node's disks, opened to the other nodes: an actor there, and a rank file as the others see it.

Bytes go through Ray's object store in blocks, on demand.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.archive_records import Mark, Record, mark, read_records
from verl_autoexport.shards.checksums import Run
from verl_autoexport.sources import holds
from verl_autoexport.sources.fsdp.discovery import (
    by_world_size,
    candidates,
    find_checkpoint,
    has_shards,
    saved_world_size,
)
from verl_autoexport.sources.fsdp.rank_files import Piece, compare, read_rank_file
from verl_autoexport.sources.fsdp.same_save import scheduler_at
from verl_autoexport.sources.saved_files import settings_files
from verl_autoexport.system.installed import versions
from verl_autoexport.system.page_cache import drop_cache

_READ_S = 120.0  # for a block
_MAX_CONFIG = 256 << 20  # bytes of a file beside the shards


@dataclass(frozen=True)
class Part:
    """One node's part of a checkpoint: path and identity of each rank's file that is there, by world size.

    `named` is the world size in the `fsdp_config.json` beside them.
    """

    host: str
    directory: Path
    sets: Mapping[int, Mapping[int, tuple[Path, Mark]]]
    named: int | None = None


class NodeFiles:
    """An actor on one node, for its disks. Methods that read or link raise SourceError.

    Ray may repeat any call whose answer was lost, after the first call or at the same time.
    """

    def about(self) -> tuple[str, dict[str, str | None]]:
        return socket.gethostname(), versions()

    def look(self, directory: str, role: str) -> Part:
        host, path = socket.gethostname(), Path(directory)
        if not any(map(has_shards, candidates(path, role))):
            return Part(host, path, {})
        source = find_checkpoint(path, role)
        sets = {
            size: {rank: (file, mark(file)) for rank, file in files.items()}
            for size, files in by_world_size(source).items()
        }
        return Part(host, source, sets, saved_world_size(source))

    def pieces(self, files: Mapping[int, Path]) -> dict[int, tuple[dict[str, Piece], tuple[Record, ...], Any]]:
        """The pieces in each file, its records, and the scheduler's state beside it."""
        found = {}
        for rank, path in files.items():
            records = read_records(path)
            found[rank] = read_rank_file(path, rank, records), records, scheduler_at(path)
        return found

    def read(self, path: Path, offset: int, nbytes: int) -> np.ndarray:
        block, done = np.empty(nbytes, dtype=np.uint8), 0
        try:
            with path.open("rb", buffering=0) as file:  # not kept open, which would keep the space of a removed file
                while done < nbytes:
                    if not (n := os.preadv(file.fileno(), [block[done:].data], offset + done)):
                        raise SourceError(f"{path}: ends at byte {offset + done}; it was truncated during the read.")
                    done += n
        except OSError as e:
            raise SourceError(f"{path}: cannot be read: {e.strerror}.") from e
        return block

    def marks(self, paths: Sequence[Path]) -> list[Mark]:
        return list(map(mark, paths))

    def drop_cache(self, paths: Sequence[Path]) -> None:
        for path in paths:
            drop_cache(path)

    def compare(self, path: Path, rank: int, seen: Mark, records: Sequence[Record], runs: Sequence[Run]) -> int:
        """Does what `fsdp_files.compare` does."""
        return compare(path, rank, seen, records, runs)

    def config_files(self, directory: Path) -> dict[str, bytes]:
        """The files needed besides the shards, as {path below `directory`: bytes}."""
        extra = settings_files(directory)
        files = [*extra, *holds.config_files(directory)]
        if large := [str(p) for p in files if p.stat().st_size > _MAX_CONFIG]:
            raise SourceError(
                f"{large[0]}: larger than {_MAX_CONFIG >> 20} MiB; not a file of a model's configuration."
            )
        return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}

    def hold(self, directory: Path, paths: Sequence[Path], hold: Path) -> bool:
        """Links these rank files and the files beside them; whether that was possible."""
        return holds.link_files(directory, paths, hold)

    def release(self, hold: Path) -> None:
        holds.release(hold)

    def release_others(self, checkpoints: str, names: Sequence[str]) -> None:
        """Deletes holds that no run knows: the run was killed while it made or released them."""
        for path in (Path(checkpoints) / holds.FOLDER).glob("step_*"):
            if path.name not in names:
                holds.release(path)


class RemoteFile:
    """A rank file on the disk of `node`; while one block of a tensor is read, the next is already requested."""

    block = 16 << 20
    """Bytes to read at a time: each costs a round trip."""

    def __init__(self, server: Any, node: str, path: Path, what: str) -> None:
        self.server, self.node, self.path, self.what = server, node, path, what
        self.ahead: tuple[int, int, Any] | None = None

    def read(self, into: memoryview, offset: int, end: int) -> None:
        nbytes, ref = len(into), None
        if self.ahead is not None and self.ahead[:2] == (offset, nbytes):
            ref = self.ahead[2]
        self.ahead = None  # the buffer is in the object store too
        ref = ref or self.server.read.remote(self.path, offset, nbytes)
        following = offset + nbytes
        if (more := min(nbytes, end - following)) > 0:
            self.ahead = following, more, self.server.read.remote(self.path, following, more)
        into[:] = memoryview(answer(ref, _READ_S, self.what))

    def let_go(self) -> None:
        self.ahead = None

    def __reduce__(self) -> Any:
        return RemoteFile, (self.server, self.node, self.path, self.what)


def answer(ref: Any, timeout_s: float, who: str) -> Any:
    """The answer of a node's actor, or its own SourceError; SourceError also if it is gone or silent."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayTaskError as e:
        raise e.cause if isinstance(e.cause, SourceError) else SourceError(f"{who}: {e.cause!r}") from e
    except GetTimeoutError:
        raise SourceError(f"{who}: no answer in time; is the node, or its disk, stuck?") from None
    except RayError as e:
        raise SourceError(f"{who} is lost: {str(e).strip().splitlines()[0]}") from e

"""The driver's side of the live source: it has workers copy their shards, and limits the memory for that."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.manifest import ShardManifest
from verl_autoexport.sources.live import in_worker
from verl_autoexport.sources.live.copier import Box, Layout, make_manifest
from verl_autoexport.sources.live.snapshot import SnapshotHandle

logger = logging.getLogger(__name__)
FOLDER = ".live"
_START_S = 600.0
_CAPTURE_S = 600.0
_SHARE = 0.3  # of the object store, for snapshots in flight


class LiveSource:
    """The live source in the driver. Raises SourceError if a worker fails, SourceBusy if one is not ready.

    `read_files`, called in a worker with its module and verl's tokenizer or processor, returns by name the
    files that verl saves beside the shards.
    """

    def __init__(
        self,
        workers: Sequence[Any],
        role: str,
        output_dir: Path,
        inflight_bytes: int | None,
        read_files: Callable[[Any, Any], dict[str, bytes]],
    ) -> None:
        self.workers, self.role = list(workers), role
        self.directory = output_dir / FOLDER
        found = self._call(in_worker.describe, role, timeout_s=_START_S)
        self.layouts = [worker.layout for worker in found]
        self.nodes = [worker.node for worker in found]
        self.backend = found[0].backend
        self.inflight_bytes = inflight_bytes or int(_SHARE * _stores(set(self.nodes)))
        self._write(self._call(in_worker.read_files, role, read_files, timeout_s=_START_S)[0])

    def manifest(self) -> ShardManifest:
        """The manifest of a future snapshot, without bytes. Raises SourceError unless it covers the whole model."""
        files = [[_Nothing()] * len(layout.chunks) for layout in self.layouts]
        return make_manifest(self.layouts, files, self.backend, "")

    def prepare(
        self,
        dtypes: Mapping[str, str],
        groups: Mapping[str, int],
        clone: bool = False,
        tied: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts the allocation of each worker's memory for copies; see `Copier` for the arguments.

        Raises SourceError if a snapshot is too large for the object store or for a node.
        """
        found = self._call(
            in_worker.prepare, self.role, dict(dtypes), dict(groups), clone, dict(tied), timeout_s=_START_S
        )
        self.layouts = [layout for layout, _ in found]
        self.nbytes = sum(layout.nbytes for layout in self.layouts)
        self.room = self.inflight_bytes // max(1, self.nbytes)
        if self.room < 1:
            raise SourceError(
                f"a snapshot takes {self.nbytes / 1e9:.2f} GB of Ray's object store, and at most "
                f"{self.inflight_bytes / 1e9:.2f} GB may be in flight (autoexport.queue.inflight_bytes): give Ray a "
                "larger store (ray_kwargs.ray_init.object_store_memory), or use autoexport.source=checkpoint."
            )
        page_locked = page_locked_ranks(self.nodes, self.layouts, [left for _, left in found])
        self._call(in_worker.allocate, page_locked, timeout_s=_START_S)
        self.known = ray.put(self.layouts)

    def capture(self, actor: Any, wait_s: float, needed: Collection[str] = ()) -> SnapshotHandle:
        """Copies this step's weights in every worker; returns when training may continue.

        Waits at most `wait_s` seconds for workers that still hand over the previous snapshot. The workers
        then keep no earlier snapshots but those in `needed`. Returns the handle for the actor.
        """
        self._call(in_worker.ready, wait_s, set(needed), timeout_s=wait_s + _CAPTURE_S)
        ident = uuid.uuid4().hex
        try:
            self._call(in_worker.capture, ident, actor, timeout_s=_CAPTURE_S)
        except SourceError:
            actor.forget.remote(ident)  # the blocks of the other workers
            raise
        return SnapshotHandle(ident, self.directory, self.known, self.backend, time.time(), self.workers, self.nodes)

    def _call(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        refs = [w.__ray_call__.remote(function, rank, *args) for rank, w in enumerate(self.workers)]
        try:
            return ray.get(refs, timeout=timeout_s)
        except RayTaskError as e:
            raise e.cause if isinstance(e.cause, SourceError) else SourceError(str(e.cause)) from e
        except RayError as e:
            raise SourceError(f"a worker of the {self.role} is lost or stuck: {str(e).splitlines()[0]}") from e

    def _write(self, files: Mapping[str, bytes]) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # files that an earlier run of another model left
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def split_otherwise(layouts: Iterable[Layout], tied: Mapping[str, str]) -> set[str]:
    """The aliases whose elements on some rank differ from those of the tensor that they are tied to."""
    found = set()
    for layout in layouts:
        boxes: dict[str, list[Box]] = {}
        for part in layout.parts:
            boxes.setdefault(part.fqn, []).extend(part.boxes)
        found |= {alias for alias, name in tied.items() if alias in boxes and boxes[alias] != boxes.get(name)}
    return found


def page_locked_ranks(nodes: Sequence[str], layouts: Sequence[Layout], left: Sequence[int]) -> set[int]:
    """The ranks whose copies may be page-locked: those of nodes where all copies fit. All arguments are by rank.

    The object store takes as many bytes of a snapshot again. Raises SourceError for a node
    that has too little memory for both, even pageable.
    """
    ranks, page_locked = defaultdict(list), set()
    for rank, node in enumerate(nodes):
        ranks[node].append(rank)
    for node, members in ranks.items():
        free, store = min(left[r] for r in members), sum(layouts[r].nbytes for r in members)
        if 2 * store > free:
            raise SourceError(
                f"node {node}: copies of the shards of its {len(members)} workers take {2 * store / 1e9:.2f} GB of "
                f"host memory, half of it in the object store, and {free / 1e9:.2f} GB are left below the limit of "
                "the machine or its control group: allow more, or use autoexport.source=checkpoint."
            )
        if store + sum(layouts[r].page_locked_bytes for r in members) <= free:
            page_locked.update(members)
        else:
            logger.warning("verl_autoexport: node %s: page-locked memory would not fit; copies may be slower", node)
    return page_locked


def _stores(nodes: set[str]) -> float:
    """The bytes of the object stores of these nodes; a worker's blocks are in its own node's store."""
    found = (n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] in nodes)
    return sum(found)


class _Nothing:
    def read(self, into: memoryview, offset: int, end: int) -> None:
        raise SourceError("nothing was copied yet.")

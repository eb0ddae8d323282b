"""Snapshots on their way from the workers to the merge: blocks in Ray's object store, and their holders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.checksums import Run
from verl_autoexport.shards.manifest import ShardManifest
from verl_autoexport.sources.live.copier import Layout, make_manifest

_FETCH_S = 300.0
_HAND_OVER_S = 600.0  # from the copy in a worker to the arrival of its blocks
_PROBE_S = 5.0  # between the probes that show whether workers live
_UNASKED_S = 60.0  # for snapshots without a request; the driver sends its request at once


class RayBlock:
    """A block in the object store of `node`, kept while a process has a ref. Once read, it stays mapped."""

    def __init__(self, ref: Any, node: str | None = None) -> None:
        self.ref: Any = ref  # Ray's ref; None once released
        self.node = node
        self.seen: memoryview | None = None

    def __reduce__(self) -> tuple[type[RayBlock], tuple[Any, ...]]:
        return RayBlock, (self.ref, self.node)

    def read(self, into: memoryview, offset: int, end: int) -> None:
        if self.seen is None:
            try:
                self.seen = memoryview(ray.get(self.ref, timeout=_FETCH_S))
            except RayError as e:
                reason = str(e).strip().splitlines()[0]
                raise SourceError(f"a part of the snapshot was lost with its worker: {reason}") from e
        into[:] = self.seen[offset : offset + len(into)]

    def let_go(self) -> None:
        self.ref = self.seen = None


@dataclass(frozen=True)
class SnapshotHandle:
    """Everything that an exporter needs to fetch a snapshot.

    `fingerprint` is its id, `layouts` a Ray ref of the ranks' layouts; `workers` are verl's and `nodes` theirs, by
    rank; `captured` is the unix time of the copy.
    """

    fingerprint: str
    directory: Path
    layouts: Any
    backend: str
    captured: float
    workers: Sequence[Any]
    nodes: Sequence[str]


class Snapshot:
    """The source that the actor exports: ranks' layouts and blocks. `hand_over_s`: from the copy to the last block."""

    kind = "live"

    def __init__(
        self, handle: SnapshotHandle, layouts: Sequence[Layout], refs: Mapping[int, Sequence[Any]], hand_over_s: float
    ) -> None:
        self.directory, self.fingerprint, self.backend = handle.directory, handle.fingerprint, handle.backend
        self.layouts, self.refs, self.hand_over_s = layouts, refs, hand_over_s
        self.nodes = handle.nodes  # by rank: a worker's blocks are in its own node's store

    def manifest(self) -> ShardManifest:
        files = [[RayBlock(ref, self.nodes[at.rank]) for ref in self.refs[at.rank]] for at in self.layouts]
        return make_manifest(self.layouts, files, self.backend, self.fingerprint)

    def verify_checksums(self, manifest: ShardManifest, runs: Sequence[Run], progress: Callable[[int], None]) -> None:
        pass  # objects in the store have no checksums

    def check_unchanged(self) -> None:
        pass  # objects in the store never change

    def drop_cache(self) -> None:
        pass  # not in a file, so not in the page cache


class Deliveries:
    """The blocks that workers have handed over to the export actor, by snapshot. Thread-safe.

    Workers repeat their hand-over until the actor answers that it no longer needs the snapshot.
    So a new instance of the actor, which knows nothing, gets all existing blocks.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.blocks: dict[str, dict[int, list[Any] | str]] = {}
        self.first: dict[str, float] = {}
        self.asked: set[str] = set()
        self.forgotten: set[str] = set()

    def ask(self, ident: str) -> None:
        """The snapshot will be exported, so it is kept until `forget`."""
        with self.changed:
            self.asked.add(ident)

    def take(self, ident: str, rank: int, blocks: list[Any] | str) -> bool:
        """Takes a rank's blocks, or the reason for none; False: nobody needs them, so the worker may free them."""
        now = time.monotonic()
        with self.changed:
            if ident not in self.asked and now - self.first.setdefault(ident, now) > _UNASKED_S:
                self._drop(ident)
            if ident in self.forgotten:
                return False
            self.blocks.setdefault(ident, {})[rank] = blocks
            self.changed.notify_all()
            return True

    def whole(self, handle: SnapshotHandle) -> Snapshot:
        """Waits, with a limit, for the blocks of all ranks; raises SourceError naming ranks that fail or stay away."""
        ident, layouts = handle.fingerprint, ray.get(handle.layouts)
        ranks, deadline, probes = {layout.rank for layout in layouts}, time.monotonic() + _HAND_OVER_S, {}
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._settled(ident, ranks), _PROBE_S)
                found = dict(self.blocks.get(ident, {}))
            missing = sorted(ranks - found.keys())
            if reasons := [v for v in found.values() if isinstance(v, str)]:
                raise SourceError(f"the snapshot is not whole: {'; '.join(reasons[:4])}")
            if not missing:
                return Snapshot(handle, layouts, found, max(0.0, time.time() - handle.captured))
            why = _dead(probes, handle.workers, missing)
            if why is None and time.monotonic() > deadline:
                why = f"not handed over within {_HAND_OVER_S:g} s"
            if why is not None:
                raise SourceError(f"the snapshot lacks ranks {missing[:8]}: {why}.")

    def forget(self, ident: str) -> None:
        """Frees a snapshot's blocks; later ones are not taken."""
        with self.changed:
            self._drop(ident)
            self.changed.notify_all()

    def _drop(self, ident: str) -> None:
        self.forgotten.add(ident)
        self.asked.discard(ident)
        self.first.pop(ident, None)
        self.blocks.pop(ident, None)

    def _settled(self, ident: str, ranks: set[int]) -> bool:
        found = self.blocks.get(ident, {})
        return found.keys() >= ranks or any(isinstance(v, str) for v in found.values())


def _dead(probes: dict[int, Any], workers: Sequence[Any], missing: Sequence[int]) -> str | None:
    """The reason if one of `missing` died. A live worker answers a probe when free, and counts as alive until then."""
    for rank in missing:
        if rank not in probes:
            probes[rank] = workers[rank].__ray_ready__.remote()
    for ref in ray.wait([probes[r] for r in missing], num_returns=len(missing), timeout=1.0)[0]:
        try:
            ray.get(ref)
        except RayError as e:
            rank = next(r for r, probe in probes.items() if probe == ref)
            return f"rank {rank} has died: {str(e).strip().splitlines()[0].rstrip('.')}"
    return None

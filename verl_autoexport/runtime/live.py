"""The live source in Ray: copies made in the workers, blocks in the object store, handed to the export actor.

Functions with a `worker` run inside verl's workers (`__ray_call__`). They are synchronous
and use no collective: verl's own methods may be suspended at an await meanwhile.
"""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from verl_autoexport.config import AutoExportConfig
from verl_autoexport.errors import SourceError
from verl_autoexport.export.assets import model_files
from verl_autoexport.export.model import capture_dtypes, plan_model
from verl_autoexport.export.spec import ExportSpec
from verl_autoexport.sources.base import ShardManifest
from verl_autoexport.sources.live import Copier, Layout, held_parts, is_flat, lay_out, make_manifest

if TYPE_CHECKING:
    from verl_autoexport.runtime.driver import RunInfo

logger = logging.getLogger(__name__)
CHUNK = 64 << 20  # bytes of a block in the object store: a merge task pulls only those that its file needs
FOLDER = ".live"
_START_S = 600.0
_CAPTURE_S = 600.0
_FETCH_S = 300.0
_SHARE = 0.3  # of the object store, for snapshots in flight


class Busy(Exception):
    """A worker still hands over the snapshot before."""


class RayBlock:
    """A block in Ray's object store; kept as long as someone holds it."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def read(self, into: memoryview, offset: int) -> None:
        try:
            into[:] = memoryview(ray.get(self.ref, timeout=_FETCH_S))[offset : offset + len(into)]
        except ray.exceptions.RayError as e:
            reason = str(e).strip().splitlines()[0]
            raise SourceError(f"a part of the snapshot is lost, with the worker that held it: {reason}") from e


class Snapshot:
    """What the actor exports: the ranks' layouts, and their blocks once all have been handed over."""

    kind = "live"

    def __init__(self, live: Mapping[str, Any], refs: Mapping[int, Sequence[Any]]) -> None:
        self.directory, self.fingerprint, self.backend = Path(live["directory"]), live["id"], live["backend"]
        self.layouts: Sequence[Layout] = ray.get(live["layouts"])
        self.refs = refs

    def manifest(self) -> ShardManifest:
        files = [[RayBlock(ref) for ref in self.refs[layout.rank]] for layout in self.layouts]
        return make_manifest(self.layouts, files, self.backend, self.fingerprint)

    def check_sums(self) -> None:
        pass  # nothing was written yet

    def check_unchanged(self) -> None:
        pass  # objects in the store never change


class LiveSource:
    """The driver's side. Raises SourceError where a worker fails, Busy where one is not ready."""

    def __init__(self, workers: Sequence[Any], role: str, output_dir: Path, inflight_bytes: int | None) -> None:
        self.workers, self.role = list(workers), role
        self.directory = output_dir / FOLDER
        found = self._call(_describe, role, timeout_s=_START_S)
        self.layouts = [layout for layout, _, _ in found]
        self.backend = found[0][1]
        self.inflight_bytes = inflight_bytes or int(_SHARE * _stores({node for _, _, node in found}))
        self._write(self._call(_read_assets, role, timeout_s=_START_S)[0])

    def manifest(self) -> ShardManifest:
        """What a snapshot will hold; its bytes are nowhere yet. Raises SourceError unless it is the whole model."""
        files = [[_Nothing()] * len(layout.chunks) for layout in self.layouts]
        return make_manifest(self.layouts, files, self.backend, "")

    def prepare(self, dtypes: Mapping[str, str], only: Collection[str], clone: bool = False) -> None:
        """Every worker begins to take the memory of its copy; see `Copier` for the arguments."""
        self.layouts = self._call(_prepare, self.role, dict(dtypes), set(only), clone, timeout_s=_START_S)
        self.nbytes = sum(sum(layout.chunks) for layout in self.layouts)
        self.room = self.inflight_bytes // max(1, self.nbytes)
        if self.room < 1:
            raise SourceError(
                f"a snapshot takes {self.nbytes / 1e9:.2f} GB of Ray's object store, and at most "
                f"{self.inflight_bytes / 1e9:.2f} GB may be in flight (autoexport.queue.inflight_bytes): give Ray a "
                "larger store (ray_kwargs.ray_init.object_store_memory), or use autoexport.source=checkpoint."
            )
        self.known = ray.put(self.layouts)

    def capture(self, actor: Any, wait_s: float) -> dict[str, Any]:
        """Copy this step's weights in every worker; returns when training may go on, with what the actor needs.

        Waits at most `wait_s` for workers that still hand over the snapshot before.
        """
        self._call(_ready, wait_s, timeout_s=wait_s + _CAPTURE_S)
        ident = uuid.uuid4().hex
        try:
            self._call(_capture, ident, actor, timeout_s=_CAPTURE_S)
        except SourceError:
            actor.forget.remote(ident)  # what the other workers hand over
            raise
        return {"id": ident, "layouts": self.known, "backend": self.backend, "directory": str(self.directory)}

    def _call(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        refs = [w.__ray_call__.remote(function, rank, *args) for rank, w in enumerate(self.workers)]
        try:
            return ray.get(refs, timeout=timeout_s)
        except ray.exceptions.RayTaskError as e:
            raise e.cause if isinstance(e.cause, SourceError | Busy) else SourceError(str(e.cause)) from e
        except ray.exceptions.RayError as e:
            raise SourceError(f"a worker of the {self.role} is lost or stuck: {str(e).splitlines()[0]}") from e

    def _write(self, files: Mapping[str, bytes]) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # what an earlier run of another model left
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def start_live(workers: Sequence[Any], settings: AutoExportConfig, info: RunInfo) -> LiveSource:
    """The live source of a run whose workers are up; raises PlanError or SourceError where it could export nothing."""
    source = LiveSource(workers, settings.role, settings.output_dir, settings.queue.inflight_bytes)
    spec = ExportSpec(
        checkpoint=source.directory, step=0, dtype=settings.weights.dtype, base_model=info.base_model,
        trust_remote_code=info.trust_remote_code, external_lib=info.external_lib, lora=settings.weights.lora,
    )  # fmt: skip
    planned = plan_model(spec, source.manifest(), values=False)
    needed = set().union(*(file.sources for file in planned.plan.files))
    source.prepare(capture_dtypes(spec, planned), needed, settings.queue.device_clone)
    logger.warning(
        "verl_autoexport: source=live: %.2f GB a snapshot, at most %d in flight", source.nbytes / 1e9, source.room
    )
    return source


def _stores(nodes: set[str]) -> float:
    """Bytes of the object stores of these nodes: a worker's blocks lie in that of its own."""
    found = (n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] in nodes)
    return sum(found)


class _Nothing:
    def read(self, into: memoryview, offset: int) -> None:
        raise SourceError("nothing was copied yet.")


# -- inside the workers ------------------------------------------------------------------

_copier: Copier | None = None
_busy: threading.Thread | None = None


def find_engine(worker: Any, role: str) -> Any:
    """The training engine in one of verl's workers; raises SourceError where it is not the one that is known."""
    for key, inner in (getattr(worker, "worker_dict", None) or {role: worker}).items():
        part = getattr(inner, "actor", None) if role == "actor" else inner
        if role in key and hasattr(getattr(part, "engine", None), "module"):
            return part.engine
    raise SourceError(f"no training engine of the {role} in {type(worker).__name__}; use autoexport.source=checkpoint.")


def _describe(worker: Any, rank: int, role: str) -> tuple[Layout, str, str]:
    module = find_engine(worker, role).module
    parts = [part for part, _ in held_parts(module, rank)]
    backend = "fsdp" if is_flat(module) else "fsdp2"
    return lay_out(rank, parts, {}, CHUNK), backend, ray.get_runtime_context().get_node_id()


def _prepare(
    worker: Any, rank: int, role: str, dtypes: Mapping[str, str], only: Collection[str], clone: bool
) -> Layout:
    global _copier, _busy
    _copier = Copier(find_engine(worker, role).module, rank, dtypes, CHUNK, clone, only)
    _busy = threading.Thread(target=_copier.allocate, name="autoexport", daemon=True)
    _busy.start()
    return _copier.layout


def _ready(worker: Any, rank: int, wait_s: float) -> None:
    _busy.join(wait_s)
    if _busy.is_alive():
        raise Busy(f"rank {rank} still takes memory, or hands over the snapshot before")


def _capture(worker: Any, rank: int, ident: str, actor: Any) -> None:
    global _busy
    finish = _copier.copy()
    _busy = threading.Thread(target=_hand_over, args=(rank, ident, actor, finish), name="autoexport", daemon=True)
    _busy.start()


def _hand_over(rank: int, ident: str, actor: Any, finish: Callable[[], None]) -> None:
    """The actor holds the blocks once it has them; then this worker's memory is free for the next snapshot."""
    try:
        finish()
        refs = [ray.put(chunk.numpy()) for chunk in _copier.chunks]
        ray.get(actor.deliver.remote(ident, rank, [refs], None))
    except Exception as e:  # the export fails with this reason; training must not notice
        logger.exception("verl_autoexport: rank %s could not hand over its shards", rank)
        actor.deliver.remote(ident, rank, None, f"rank {rank}: {type(e).__name__}: {e}")


def _read_assets(worker: Any, rank: int, role: str) -> dict[str, bytes]:
    """What verl saves beside the shards, by path; that of rank 0 is enough."""
    if rank:
        return {}
    engine = find_engine(worker, role)
    module = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
    return model_files(module, getattr(getattr(engine, "checkpoint_manager", None), "processing_class", None))

"""The code that runs inside verl's workers (`__ray_call__`): it copies shards and hands them over as Ray objects.

Synchronous and without collectives: one of verl's own methods may be suspended at an await during a call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError

from verl_autoexport.errors import SourceBusy, SourceError
from verl_autoexport.sources.live.copier import Copier, Layout, frozen_names, held_parts, is_flat, lay_out
from verl_autoexport.system.host_memory import headroom

logger = logging.getLogger(__name__)
CHUNK = 64 << 20  # bytes of a block in the object store; a power of two, as page-locked memory is taken
_AGAIN_S = 2.0  # between two calls to the export actor

_copier: Copier | None = None
_free = threading.Event()  # set while the copier has its memory, and no snapshot in it waits for its hand-over
_held: dict[str, tuple[list[Any] | None, str | None]] = {}
"""By snapshot: its blocks, which die with this process, or the reason for none; kept until the merge is done."""


@dataclass(frozen=True)
class Worker:
    """A worker's answers at the start: the rank's shards, its kind of sharding, and its node."""

    layout: Layout
    backend: str
    node: str


def find_engine(worker: Any, role: str) -> Any:
    """The training engine in one of verl's workers, with its `module`; raises SourceError if it is not a known one.

    Workers before verl 0.8, and later ones with `use_legacy_worker_impl`, hold the module themselves.
    """
    for key, inner in (getattr(worker, "worker_dict", None) or {role: worker}).items():
        if role not in key:
            continue
        module = getattr(inner, "actor_module_fsdp" if role == "actor" else "critic_module", None)
        if module is not None:
            return SimpleNamespace(module=module, checkpoint_manager=getattr(inner, "checkpoint_manager", None))
        engine = getattr(getattr(inner, "actor", None) if role == "actor" else inner, "engine", None)
        if isinstance(getattr(engine, "module", None), torch.nn.Module):  # Megatron's is a list of them
            return engine
    raise SourceError(f"no training engine of the {role} in {type(worker).__name__}; use autoexport.source=checkpoint.")


def describe(worker: Any, rank: int, role: str) -> Worker:
    module = find_engine(worker, role).module
    parts = [part for part, _ in held_parts(module, rank)]
    backend = "fsdp" if is_flat(module) else "fsdp2"
    return Worker(lay_out(rank, parts, {}, CHUNK), backend, ray.get_runtime_context().get_node_id())


def frozen(worker: Any, role: str) -> tuple[str, ...] | None:
    """The parameters that are not trained; None if the engine is not a known one."""
    try:
        return tuple(frozen_names(find_engine(worker, role).module))
    except SourceError:
        return None


def prepare(
    worker: Any,
    rank: int,
    role: str,
    dtypes: Mapping[str, str],
    groups: Mapping[str, int],
    clone: bool,
    tied: Mapping[str, str],
) -> tuple[Layout, int]:
    """The future copy's layout, and the free bytes of host memory here; takes no memory yet."""
    global _copier
    _copier = Copier(find_engine(worker, role).module, rank, dtypes, CHUNK, clone, groups, tied)
    _held.clear()
    return _copier.layout, headroom()


def _prepared() -> Copier:
    if _copier is None:
        raise SourceError("this worker was not prepared for copies; was its process started again?")
    return _copier


def allocate(worker: Any, rank: int, page_locked: Collection[int]) -> None:
    """Starts the allocation in the background, page-locked for the ranks in `page_locked`."""
    copier = _prepared()
    _free.clear()

    def take() -> None:
        try:
            copier.allocate(rank in page_locked)
        finally:
            _free.set()

    threading.Thread(target=take, name="autoexport", daemon=True).start()


def ready(worker: Any, rank: int, wait_s: float, needed: Collection[str]) -> None:
    """Frees all snapshots but `needed`; raises SourceBusy if the memory is still in use after `wait_s` seconds."""
    for ident in _held.keys() - needed:
        _held.pop(ident, None)
    if not _free.wait(wait_s):
        raise SourceBusy(f"rank {rank} still takes memory, or hands over the previous snapshot")


def capture(worker: Any, rank: int, ident: str, actor: Any) -> None:
    """Copies the shards; returns when training may change the weights."""
    copier = _prepared()
    finish = copier.copy()
    _free.clear()
    threading.Thread(
        target=_hand_over, args=(rank, ident, actor, copier, finish), name="autoexport", daemon=True
    ).start()


def _hand_over(rank: int, ident: str, actor: Any, copier: Copier, finish: Callable[[], None]) -> None:
    try:
        finish()
        _held[ident] = [ray.put(chunk.numpy()) for chunk in copier.chunks], None
    except Exception as e:  # the export fails with this reason; training must not notice
        logger.exception("verl_autoexport: rank %s could not hand over its shards", rank)
        _held[ident] = None, f"rank {rank}: {type(e).__name__}: {e}"
    finally:
        _free.set()
    while (held := _held.get(ident)) is not None:
        blocks, reason = held
        del held
        # Nested, so that Ray passes refs. Repeated, since a restarted actor knows nothing.
        if not _delivered(actor, ident, rank, [blocks] if blocks is not None else None, reason):
            break
        del blocks
        time.sleep(_AGAIN_S)
    _held.pop(ident, None)


def _delivered(actor: Any, ident: str, rank: int, blocks: list[list[Any]] | None, reason: str | None) -> bool:
    """Whether the actor may still need the blocks; False once it does not, or is gone for good."""
    try:
        # A future, since verl's workers are async actors, where Ray warns of ray.get in any thread.
        return actor.deliver.remote(ident, rank, blocks, reason).future().result()
    except ActorUnavailableError:  # the actor is being restarted
        return True
    except RayError as e:
        logger.info("verl_autoexport: rank %s: the export actor is gone: %s", rank, str(e).strip().splitlines()[0])
        return False


def read_files(worker: Any, rank: int, role: str, read: Callable[[Any, Any], dict[str, bytes]]) -> dict[str, bytes]:
    """The files that verl saves beside the shards, by path, as `read` returns them; rank 0's are enough."""
    if rank:
        return {}
    engine = find_engine(worker, role)
    module = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
    return read(module, getattr(getattr(engine, "checkpoint_manager", None), "processing_class", None))

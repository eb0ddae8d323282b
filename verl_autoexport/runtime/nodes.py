"""Checkpoints without a shared file system: each node holds its own ranks' shards, and an actor there reads them.

Nothing is copied beforehand: metadata is read where the shards lie, and their bytes go through
Ray's object store to the merge in blocks, each as it is asked for.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_autoexport.errors import ConfigError, SourceError
from verl_autoexport.runtime.tasks import versions
from verl_autoexport.sources import pins
from verl_autoexport.sources.base import Check, ShardManifest
from verl_autoexport.sources.checkpoints import Stat, brief, digest, find_checkpoint, present_ranks, stats
from verl_autoexport.sources.fsdp_files import Piece, make_manifest, read_rank_file
from verl_autoexport.sources.sum_check import SumCheck

logger = logging.getLogger(__name__)
_START_S = 60.0  # until an actor answers first: its process starts, torch is imported
_ASK_S = 60.0  # metadata, links
_READ_S = 120.0  # a block
_SUMS_S = 24 * 3600.0  # reading all shards of a node; a node that dies meanwhile is told at once
_MAX_CONFIG = 256 << 20  # bytes of a file beside the shards


@dataclass(frozen=True)
class Part:
    """What one node holds of a checkpoint: `files` are path and identity of the ranks that are there."""

    host: str
    directory: Path
    world_size: int
    files: Mapping[int, tuple[Path, Stat]]


class NodeFiles:
    """An actor on one node, for what is on its disks. All methods but `about` raise SourceError."""

    def __init__(self) -> None:
        self.checks: dict[str, SumCheck | None] = {}  # by name; None: not to begin any more

    def about(self) -> tuple[str, dict[str, str | None]]:
        return socket.gethostname(), versions()

    def look(self, directory: str, role: str) -> Part:
        host, path = socket.gethostname(), Path(directory)
        if not path.is_dir() or not any(present_ranks(p)[1] for p in (path, path / role)):
            return Part(host, path, 0, {})
        source = find_checkpoint(path, role)
        world_size, files = present_ranks(source)
        seen = dict(zip(files, stats(list(files.values())), strict=True))
        return Part(host, source, world_size, {rank: (file, seen[rank]) for rank, file in files.items()})

    def pieces(self, files: Mapping[int, Path]) -> dict[int, dict[str, Piece]]:
        return {rank: read_rank_file(path, rank) for rank, path in files.items()}

    def read(self, path: Path, offset: int, nbytes: int) -> np.ndarray:
        block, done = np.empty(nbytes, dtype=np.uint8), 0
        try:
            with path.open("rb", buffering=0) as file:  # not kept open: that would keep the space of a removed file
                while done < nbytes:
                    if not (n := os.preadv(file.fileno(), [block[done:]], offset + done)):
                        raise SourceError(f"{path}: ends at byte {offset + done}; it was truncated meanwhile.")
                    done += n
        except OSError as e:
            raise SourceError(f"{path}: cannot be read: {e.strerror}.") from e
        return block

    def stats(self, paths: Sequence[Path]) -> list[Stat]:
        return stats(paths)

    def check_sums(self, name: str, paths: Sequence[Path]) -> None:
        with SumCheck(paths) as check:
            if self.checks.setdefault(name, check) is check:
                check.wait()
        self.checks[name] = None

    def stop_sums(self, name: str) -> None:
        if check := self.checks.setdefault(name, None):
            check.stop()

    def config_files(self, directory: Path) -> dict[str, bytes]:
        """By path below `directory`, what is needed beside the shards."""
        extra = [directory / name for name in pins.EXTRA if (directory / name).is_file()]
        files = [*extra, *pins.config_files(directory)]
        if large := [str(p) for p in files if p.stat().st_size > _MAX_CONFIG]:
            raise SourceError(
                f"{large[0]}: larger than {_MAX_CONFIG >> 20} MiB; not a file of a model's configuration."
            )
        return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}

    def pin(self, directory: str, role: str, pin: str) -> bool:
        """Link what is here; whether that was possible."""
        part = self.look(directory, role)
        paths = [path for path, _ in part.files.values()]
        return pins.link_files(part.directory, paths, Path(pin)) if paths else True

    def release(self, pin: str) -> None:
        pins.release(Path(pin))

    def release_others(self, checkpoints: str, names: Sequence[str]) -> None:
        """Drop what no run knows of any more: it was killed while it pinned, or released."""
        for path in (Path(checkpoints) / pins.FOLDER).glob("step_*"):
            if path.name not in names:
                pins.release(path)


class Nodes:
    """The nodes of the cluster, with a `NodeFiles` on each; `hosts` are those of the ranks, where they are known.

    Raises SourceError where a node does not answer, ConfigError where it has other versions installed.
    """

    def __init__(self, only: Iterable[str] | None = None, hosts: Mapping[int, str] | None = None) -> None:
        self.only = None if only is None else set(only)
        self.hosts = dict(hosts or {})
        self.servers: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Ask those that are alive now: all of them, or those that were named."""
        alive = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
        wanted = {node: host for node, host in alive.items() if self.only is None or node in self.only}
        self.names |= wanted
        self.servers = {node: server for node, server in self.servers.items() if node in wanted}
        new = sorted(wanted.keys() - self.servers.keys())
        actor = ray.remote(NodeFiles)
        for node in new:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            options = actor.options(num_cpus=0, num_gpus=0, max_concurrency=8, scheduling_strategy=strategy)
            self.servers[node] = options.remote()
        for node, (host, found) in self.ask_each("about", dict.fromkeys(new, ()), _START_S).items():
            if found != versions():
                raise ConfigError(f"{host} ({node[:8]}) has {found}, this node has {versions()}; install the same.")

    def ask(self, method: str, *args: Any, timeout_s: float = _ASK_S) -> dict[str, Any]:
        """The answers of all nodes, by node."""
        return self.ask_each(method, dict.fromkeys(self.servers, args), timeout_s)

    def ask_each(self, method: str, args: Mapping[str, tuple[Any, ...]], timeout_s: float = _ASK_S) -> dict[str, Any]:
        """The same of some nodes, with arguments for each."""
        return self.collect(self.begin_each(method, args), timeout_s)

    def begin_each(self, method: str, args: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Ask them, and return before they answer."""
        return {node: getattr(self.servers[node], method).remote(*given) for node, given in args.items()}

    def collect(self, refs: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answers to what was begun."""
        ray.wait(list(refs.values()), num_returns=max(1, len(refs)), timeout=timeout_s) if refs else None
        return {node: answer(ref, 0, f"node {self.names[node]} ({node[:8]})") for node, ref in refs.items()}

    def pin(self, checkpoint_dir: Path, step: int, role: str) -> pins.Pin:
        """As `pins.make_pin`, on every node that holds shards of the step."""
        parts = self.ask("look", str(checkpoint_dir), role)
        ranks = _one_of_each(checkpoint_dir, parts, self.hosts)
        origin, mark = parts[ranks[0][0]].directory, digest([seen for _, _, seen in ranks])
        path = pins.pin_path(checkpoint_dir, step, uuid.uuid4().hex)
        try:
            linked = all(self.ask("pin", str(checkpoint_dir), role, str(path)).values())
            path.mkdir(parents=True, exist_ok=True)  # this node may hold none of the shards
            pin = pins.Pin(path, step, str(origin), mark, linked, spread=True)
            pins.record(pin)
        except (SourceError, OSError):
            self.release(path)
            raise
        return pin

    def release(self, pin: Path) -> None:
        """Drop the links on every node; nothing waits for it."""
        for server in self.servers.values():
            server.release.remote(str(pin))

    def close(self) -> None:
        """End the actors."""
        for server in self.servers.values():
            ray.kill(server)


def answer(ref: Any, timeout_s: float, who: str) -> Any:
    """What a node's actor answered, its own SourceError as it is; SourceError too where it is gone or silent."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as e:
        raise e.cause if isinstance(e.cause, SourceError) else SourceError(f"{who}: {e.cause!r}") from e
    except ray.exceptions.GetTimeoutError:
        raise SourceError(f"{who}: no answer in time; is the node, or its disk, stuck?") from None
    except ray.exceptions.RayError as e:
        raise SourceError(f"{who} is lost: {str(e).strip().splitlines()[0]}") from e


def find_nodes(workers: Sequence[Any], checkpoints: Path) -> Nodes | None:
    """The nodes of verl's workers, where they do not see this node's checkpoint directory; else None."""
    probe = checkpoints / pins.FOLDER / f".probe-{uuid.uuid4().hex}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    try:
        asked = [w.__ray_call__.remote(_look_around, str(probe)) for w in workers]
        found = [answer(ref, _ASK_S, f"rank {rank}") for rank, ref in enumerate(asked)]
    finally:
        probe.unlink()
    if all(sees for _, sees in found):
        return None
    nodes = Nodes({node for node, _ in found})
    nodes.hosts = {rank: nodes.names[node] for rank, (node, _) in enumerate(found)}
    ranks: dict[str, list[int]] = {}
    for rank, (node, _) in enumerate(found):
        ranks.setdefault(node, []).append(rank)
    where = "; ".join(f"{nodes.names[node]}: ranks {brief(held)}" for node, held in ranks.items())
    logger.warning("verl_autoexport: %s is on the nodes' own disks; shards are read from there: %s", checkpoints, where)
    return nodes


def _look_around(worker: Any, path: str) -> tuple[str, bool]:
    return ray.get_runtime_context().get_node_id(), Path(path).exists()


class SpreadFiles:
    """A checkpoint whose rank files lie on several nodes; `directory` is a copy of what rank 0 has beside them."""

    kind = "checkpoint"

    def __init__(self, nodes: Nodes, directory: Path, role: str) -> None:
        self.nodes = nodes
        nodes.refresh()
        parts: dict[str, Part] = nodes.ask("look", str(directory), role)
        self.ranks = _one_of_each(directory, parts, nodes.hosts)
        self.origin = parts[self.ranks[0][0]].directory
        self.fingerprint = digest([seen for _, _, seen in self.ranks])
        self.folder = tempfile.TemporaryDirectory(prefix="verl-autoexport-")  # goes with this object
        self.directory = Path(self.folder.name)
        self._fetch_config()

    def manifest(self) -> ShardManifest:
        by_node = self.nodes.ask_each("pieces", {n: (f,) for n, f in self._by_node().items()})
        pieces = {rank: found for ranks in by_node.values() for rank, found in ranks.items()}
        files = [
            RemoteFile(
                self.nodes.servers[node], node, path, seen[2], f"{path} (rank {rank}) on {self.nodes.names[node]}"
            )
            for rank, (node, path, seen) in enumerate(self.ranks)
        ]
        return make_manifest(self.directory, [pieces[r] for r in range(len(files))], files, self.fingerprint)

    def check_sums(self) -> Check:
        return _NodeSums(self.nodes, {node: list(files.values()) for node, files in self._by_node().items()})

    def check_unchanged(self) -> None:
        by_node = self._by_node()
        found = self.nodes.ask_each("stats", {node: (list(files.values()),) for node, files in by_node.items()})
        now = {rank: s for node, files in by_node.items() for rank, s in zip(files, found[node], strict=True)}
        if changed := [rank for rank, (_, _, seen) in enumerate(self.ranks) if seen != now[rank]]:
            raise SourceError(
                f"{self.origin}: the files of ranks {brief(changed)} changed while being exported. The step was saved "
                "again meanwhile; export it again."
            )

    def _by_node(self) -> dict[str, dict[int, Path]]:
        found: dict[str, dict[int, Path]] = {}
        for rank, (node, path, _) in enumerate(self.ranks):
            found.setdefault(node, {})[rank] = path
        return found

    def _fetch_config(self) -> None:
        node = self.ranks[0][0]  # verl's rank 0 saves the model's configuration
        found = self.nodes.ask_each("config_files", {node: (self.origin,)})[node]
        for name, content in found.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


class _NodeSums(Check):
    """A SumCheck on every node, of what is there."""

    def __init__(self, nodes: Nodes, files: Mapping[str, Sequence[Path]]) -> None:
        self.nodes, self.name = nodes, uuid.uuid4().hex
        self.refs = nodes.begin_each("check_sums", {node: (self.name, paths) for node, paths in files.items()})

    def wait(self) -> None:
        self.nodes.collect(self.refs, _SUMS_S)

    def stop(self) -> None:
        self.nodes.begin_each("stop_sums", dict.fromkeys(self.refs.keys() & self.nodes.servers.keys(), (self.name,)))


def _one_of_each(directory: Path, parts: Mapping[str, Part], hosts: Mapping[int, str]) -> list[tuple[str, Path, Stat]]:
    """Node, path and identity of every rank's file; raises SourceError naming ranks and hosts that lack theirs."""
    held = {node: part for node, part in parts.items() if part.files}
    sizes = {part.world_size for part in held.values()}
    if len(sizes) > 1:
        raise SourceError(f"{directory}: shards of different world sizes on different nodes: {sorted(sizes)}.")
    where = {rank: node for node, part in sorted(held.items(), reverse=True) for rank in part.files}
    missing = [rank for rank in range(max(sizes, default=0)) if rank not in where]
    if missing or not held:
        expected = sorted({f"{hosts[r]} (rank {r})" for r in missing or hosts if r in hosts})
        there = [f"{part.host} holds {brief(sorted(part.files)) or 'none'}" for part in parts.values()]
        lacking = f"the files of ranks {brief(missing)} of {max(sizes)} are" if held else "no rank's files are"
        should = f"; expected on {', '.join(expected[:16])}" if expected else ""
        raise SourceError(f"{directory}: {lacking} on no node of the cluster{should}. Found: {'; '.join(there)}.")
    return [(where[rank], *parts[where[rank]].files[rank]) for rank in range(max(sizes))]


class RemoteFile:
    """A rank file of `size` bytes on the disk of `node`; the block after the one that is read is asked for with it."""

    block = 16 << 20
    """Bytes to read at a time: each costs a round trip."""

    def __init__(self, server: Any, node: str, path: Path, size: int, what: str) -> None:
        self.server, self.node, self.path, self.size, self.what = server, node, path, size, what
        self.ahead: tuple[int, int, Any] | None = None

    def read(self, into: memoryview, offset: int) -> None:
        nbytes, ref = len(into), None
        if self.ahead is not None and self.ahead[:2] == (offset, nbytes):
            ref = self.ahead[2]
        self.ahead = None  # it, too, lies in the object store
        ref = ref or self.server.read.remote(self.path, offset, nbytes)
        if (following := offset + nbytes) + nbytes <= self.size:
            self.ahead = following, nbytes, self.server.read.remote(self.path, following, nbytes)
        into[:] = memoryview(answer(ref, _READ_S, self.what))

    def let_go(self) -> None:
        self.ahead = None

    def __reduce__(self) -> Any:
        return RemoteFile, (self.server, self.node, self.path, self.size, self.what)

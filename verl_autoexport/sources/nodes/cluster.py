"""Checkpoints without a shared file system: each node has its own ranks' shards, and an actor there reads them.

Nothing is copied in advance: metadata is read on the shards' nodes, and the bytes go through
Ray's object store to the merge.
"""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_autoexport.errors import AutoExportError, ConfigError, SourceError
from verl_autoexport.shards.archive_records import Mark
from verl_autoexport.shards.checksums import Run
from verl_autoexport.shards.manifest import ShardManifest
from verl_autoexport.sources import holds
from verl_autoexport.sources.fsdp.discovery import brief, digest
from verl_autoexport.sources.fsdp.rank_files import CHANGED, make_manifest, runs_by_file
from verl_autoexport.sources.fsdp.same_save import check_schedulers
from verl_autoexport.sources.nodes.agent import NodeFiles, Part, RemoteFile, answer
from verl_autoexport.system.installed import versions

logger = logging.getLogger(__name__)
_START_S = 60.0  # until an actor's first answer: its process starts and imports torch
_ASK_S = 60.0  # for listings and links
_METADATA_S = 600.0  # for the metadata of all ranks of a node
_POLL_S = 1.0
_SUMS_S = 24 * 3600.0  # for reading all shards of a node; a node that dies or finds damage reports at once


_T = TypeVar("_T")
_Held = tuple[str, Path, Mark]
"""Node, path and identity of a rank's file."""


class Nodes:
    """Nodes of the cluster, with a `NodeFiles` on each: those of `homes`, by rank, or all that are alive.

    Raises SourceError if a node does not answer, ConfigError if it has other versions installed. If all nodes
    are asked, some may serve other purposes; these are in `silent` instead, with the reason.
    """

    def __init__(self, homes: Mapping[int, str] = MappingProxyType({})) -> None:
        self.homes = dict(homes)
        self.servers: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.silent: dict[str, AutoExportError] = {}
        self.refresh()

    def refresh(self) -> None:
        """Looks up the nodes that are alive now."""
        alive = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
        homes = set(self.homes.values()) or alive.keys()
        wanted = {node: host for node, host in alive.items() if node in homes}
        self.names |= wanted
        self.servers = {node: server for node, server in self.servers.items() if node in wanted}
        self.silent = {node: why for node, why in self.silent.items() if isinstance(why, ConfigError)}
        new = sorted(wanted.keys() - self.servers.keys() - self.silent.keys())
        actor = ray.remote(NodeFiles)
        for node in new:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            options = actor.options(
                num_cpus=0, num_gpus=0, max_concurrency=8, scheduling_strategy=strategy,
                max_restarts=-1, max_task_retries=2,
            )  # fmt: skip
            self.servers[node] = options.remote()
        refs = self.begin_each(NodeFiles.about, dict.fromkeys(new, ()))
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=_START_S)
        for node, ref in refs.items():
            try:
                self._check(node, ref)
            except (SourceError, ConfigError) as e:
                if self.homes:
                    raise
                logger.warning("verl_autoexport: not asked for shards: %s", e)
                self.silent[node] = e
                del self.servers[node]

    def _check(self, node: str, ref: Any) -> None:
        host, found = self.collect({node: ref}, 0)[node]
        if found != versions():
            raise ConfigError(f"{host} ({node[:8]}) has {found}, this node has {versions()}; install the same.")

    def ask(self, method: Callable[..., _T], *args: Any, timeout_s: float = _ASK_S) -> dict[str, _T]:
        """The answers of all nodes, by node, to a method of `NodeFiles`."""
        return self.ask_each(method, dict.fromkeys(self.servers, args), timeout_s)

    def ask_each(
        self, method: Callable[..., _T], args: Mapping[str, tuple[Any, ...]], timeout_s: float = _ASK_S
    ) -> dict[str, _T]:
        """The answers of some nodes, with arguments for each."""
        return self.collect(self.begin_each(method, args), timeout_s)

    def begin_each(self, method: Callable[..., Any], args: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Ask them, and return before they answer."""
        return {node: getattr(self.servers[node], method.__name__).remote(*given) for node, given in args.items()}

    def collect(self, refs: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answers to the calls of `begin_each`."""
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
        return {node: answer(ref, 0, f"node {self.names[node]} ({node[:8]})") for node, ref in refs.items()}

    def hold(self, checkpoint_dir: Path, step: int, role: str) -> holds.Hold:
        """As `holds.make_hold`, on every node that holds shards of the step."""
        parts = self.ask(NodeFiles.look, str(checkpoint_dir), role)
        ranks = _one_of_each(checkpoint_dir, parts, self, self.homes)
        origin, mark = parts[ranks[0][0]].directory, digest([seen for _, _, seen in ranks])
        path = holds.hold_path(checkpoint_dir, step, uuid.uuid4().hex)
        held = {n: (parts[n].directory, list(files.values()), path) for n, files in _by_node(ranks).items()}
        try:
            linked = all(self.ask_each(NodeFiles.hold, held).values())
            path.mkdir(parents=True, exist_ok=True)  # this node may hold none of the shards
            hold = holds.Hold(path, step, str(origin), mark, linked, spread=True)
            holds.record(hold)
        except (SourceError, OSError):
            self.release(path)
            raise
        return hold

    def release(self, hold: Path) -> None:
        """Deletes the links on every node; nothing waits for this."""
        for server in self.servers.values():
            server.release.remote(hold)

    def release_others(self, checkpoints: Path) -> None:
        """Drop the holds on every node that are not known here any more."""
        known = [path.name for path in (checkpoints / holds.FOLDER).glob("step_*")]  # unreadable ones, too
        self.ask(NodeFiles.release_others, str(checkpoints), known)

    def close(self) -> None:
        """Ends the actors."""
        for server in self.servers.values():
            ray.kill(server)


def find_nodes(workers: Sequence[Any], checkpoints: Path) -> Nodes | None:
    """The nodes of verl's workers, if they do not see this node's checkpoint directory; else None."""
    probe = checkpoints / holds.FOLDER / f".probe-{uuid.uuid4().hex}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    try:
        asked = [w.__ray_call__.remote(_look_around, str(probe)) for w in workers]
        found = [answer(ref, _ASK_S, f"rank {rank}") for rank, ref in enumerate(asked)]
    finally:
        probe.unlink()
    if all(sees for _, sees in found):
        return None
    nodes = Nodes({rank: node for rank, (node, _) in enumerate(found)})
    ranks: dict[str, list[int]] = {}
    for rank, (node, _) in enumerate(found):
        ranks.setdefault(node, []).append(rank)
    where = "; ".join(f"{nodes.names[node]}: ranks {brief(held)}" for node, held in ranks.items())
    logger.info("verl_autoexport: %s is on the nodes' own disks; shards are read from there: %s", checkpoints, where)
    return nodes


def _look_around(worker: Any, path: str) -> tuple[str, bool]:
    return ray.get_runtime_context().get_node_id(), Path(path).exists()


class SpreadFiles:
    """A checkpoint whose rank files are on several nodes; `directory` is a copy of rank 0's files beside them."""

    kind = "checkpoint"

    def __init__(self, nodes: Nodes, directory: Path, role: str, homes: Sequence[str] = ()) -> None:
        """`homes` are the nodes of the ranks; only those still alive count."""
        self.nodes = nodes
        nodes.refresh()
        parts = nodes.ask(NodeFiles.look, str(directory), role)
        there = {rank: node for rank, node in enumerate(homes) if node in nodes.servers}
        self.ranks = _one_of_each(directory, parts, nodes, there)
        self.origin = parts[self.ranks[0][0]].directory
        self.fingerprint = digest([seen for _, _, seen in self.ranks])
        self.folder = tempfile.TemporaryDirectory(prefix="verl-autoexport-")  # deleted with this object
        self.directory = Path(self.folder.name)
        self._fetch_config()

    def manifest(self) -> ShardManifest:
        by_node = self.nodes.ask_each(NodeFiles.pieces, {n: (f,) for n, f in _by_node(self.ranks).items()}, _METADATA_S)
        pieces = {rank: found for ranks in by_node.values() for rank, found in ranks.items()}
        files = [
            RemoteFile(self.nodes.servers[node], node, path, f"{path} (rank {rank}) on {self.nodes.names[node]}")
            for rank, (node, path, _) in enumerate(self.ranks)
        ]
        self.check_unchanged()  # everything comes from one save
        ranks, records, schedulers = zip(*(pieces[r] for r in range(len(files))), strict=True)
        check_schedulers([path for _, path, _ in self.ranks], schedulers)
        return make_manifest(self.directory, ranks, files, self.fingerprint, records)

    def verify_checksums(self, manifest: ShardManifest, runs: Sequence[Run], progress: Callable[[int], None]) -> None:
        """Each node reads the bytes of its files that were not read yet, and compares them."""
        by_file, left = runs_by_file(runs), {}
        for rank, records in manifest.records.items():
            node, path, seen = self.ranks[rank]
            left[self.nodes.servers[node].compare.remote(path, rank, seen, records, by_file.get(rank, ()))] = node
        deadline = time.monotonic() + _SUMS_S
        while left:
            done, _ = ray.wait(list(left), timeout=_POLL_S)
            for ref in done if time.monotonic() < deadline else list(left):
                progress(next(iter(self.nodes.collect({left.pop(ref): ref}, 0).values())))
            progress(0)  # raises if nobody waits any more

    def check_unchanged(self) -> None:
        by_node = _by_node(self.ranks)
        found = self.nodes.ask_each(NodeFiles.marks, {node: (list(files.values()),) for node, files in by_node.items()})
        now = {rank: s for node, files in by_node.items() for rank, s in zip(files, found[node], strict=True)}
        if changed := [rank for rank, (_, _, seen) in enumerate(self.ranks) if seen != now[rank]]:
            raise SourceError(f"{self.origin}: the files of ranks {brief(changed)} {CHANGED}")

    def drop_cache(self) -> None:
        held = {node: (list(files.values()),) for node, files in _by_node(self.ranks).items()}
        self.nodes.begin_each(NodeFiles.drop_cache, {n: paths for n, paths in held.items() if n in self.nodes.servers})

    def _fetch_config(self) -> None:
        node = self.ranks[0][0]  # verl's rank 0 saves the model's configuration
        found = self.nodes.ask_each(NodeFiles.config_files, {node: (self.origin,)})[node]
        for name, content in found.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _one_of_each(directory: Path, parts: Mapping[str, Part], nodes: Nodes, homes: Mapping[int, str]) -> list[_Held]:
    """Every rank's file; raises SourceError naming ranks and hosts whose file is missing or differs.

    A rank's file on another node than its own is from an earlier run.
    """
    world_size = _world_size(directory, parts, homes)
    held: dict[int, dict[str, tuple[Path, Mark]]] = {}
    for node, part in sorted(parts.items()):
        for rank, file in part.sets.get(world_size, {}).items():
            if homes.get(rank, node) == node:
                held.setdefault(rank, {})[node] = file
    if not held or not held.keys() >= set(range(world_size)):
        missing = [rank for rank in range(world_size) if rank not in held]
        raise SourceError(_lacking(directory, parts, world_size, missing, nodes, homes))
    if extra := sorted(held.keys() - set(range(world_size))):
        raise SourceError(f"{directory}: ranks {brief(extra)} do not exist in world size {world_size}.")
    return [_the_one(directory, rank, held[rank], nodes) for rank in range(world_size)]


def _world_size(directory: Path, parts: Mapping[str, Part], homes: Mapping[int, str]) -> int:
    """The world size of the newest save, which rank 0 writes into its node's `fsdp_config.json`; 0 without shards.

    Raises SourceError if there are shards of several sizes, and the nodes name none of them or contradict each other.
    """
    sizes = {size for part in parts.values() for size in part.sets}
    if len(sizes) < 2:
        return max(sizes, default=0)
    tells = [parts[homes[0]]] if homes.get(0) in parts else parts.values()
    named = {part.named for part in tells if part.named is not None}
    if len(named) != 1 or not named <= sizes:
        raise SourceError(
            f"{directory}: shards of different world sizes are mixed on the nodes: {sorted(sizes)}, and "
            f"fsdp_config.json names {sorted(named) or 'none'}. Two runs wrote to the same step; remove the files of "
            "the older one."
        )
    return named.pop()


def _the_one(directory: Path, rank: int, files: Mapping[str, tuple[Path, Mark]], nodes: Nodes) -> _Held:
    """One of the files of a rank, which must all have the same content."""
    if len({seen for _, seen in files.values()}) > 1:
        where = " and ".join(f"{nodes.names[node]} ({node[:8]})" for node in files)
        raise SourceError(
            f"{directory}: different files of rank {rank} are on {where}: two runs wrote to the same step. Remove "
            "those of the older one."
        )
    node, file = next(iter(files.items()))
    return node, *file


def _lacking(
    directory: Path,
    parts: Mapping[str, Part],
    size: int,
    missing: Sequence[int],
    nodes: Nodes,
    homes: Mapping[int, str],
) -> str:
    hosts = {rank: nodes.names.get(node, node[:8]) for rank, node in homes.items()}
    expected = sorted({f"{hosts[r]} (rank {r})" for r in missing or hosts if r in hosts})
    there = [f"{part.host} holds {brief(sorted(part.sets.get(size, ()))) or 'none'}" for part in parts.values()]
    lacking = f"the files of ranks {brief(missing)} of {size} are" if missing else "files of an FSDP model are"
    should = f"; expected on {', '.join(expected[:16])}" if expected else ""
    where = "not on their own nodes" if expected else "on no node of the cluster"
    silent = f" Not asked: {'; '.join(map(str, nodes.silent.values()))}" if nodes.silent else ""
    return f"{directory}: {lacking} {where}{should}. Found: {'; '.join(there)}.{silent}"


def _by_node(ranks: Sequence[_Held]) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {}
    for rank, (node, path, _) in enumerate(ranks):
        found.setdefault(node, {})[rank] = path
    return found

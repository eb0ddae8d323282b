"""Merge jobs as Ray tasks: without a GPU, on any node that sees the output and the shards, with limited waits."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_autoexport.errors import MergeError, SourceError
from verl_autoexport.merge.job import MergeJob, WrittenFile, one_torch_thread
from verl_autoexport.shards.manifest import ITEMSIZE
from verl_autoexport.system.file_identity import stats
from verl_autoexport.system.installed import versions

logger = logging.getLogger(__name__)
_POLL_S = 1.0
_CANCEL_S = 10.0
_SOON_S = 2.0  # a task without a free CPU waits so long; verl holds its CPUs until the end
_RETRIES = 3


class NotShared(Exception):
    """The task's node does not see the named path in the same state as the export's node."""


class Lost(Exception):
    """The process of a task died; Ray runs the attempt again."""


@dataclass(frozen=True)
class Home:
    """The export's node, with which a task compares its own: host, packages, and the shards.

    `files` are size (bytes) and mtime (ns) of every file that is read by path.
    """

    node: str
    nonce: Path
    files: Mapping[Path, tuple[int, ...]]
    versions: Mapping[str, str | None]

    @classmethod
    def here(cls, jobs: Iterable[MergeJob], nonce: Path) -> Home:
        """The description of this node; raises SourceError if a file is gone."""
        paths = sorted({file for job in jobs for file in job.manifest.files if isinstance(file, Path)})
        seen = [found[2:] for found in stats(paths)]
        return cls(ray.get_runtime_context().get_node_id(), nonce, dict(zip(paths, seen, strict=True)), versions())

    def compared(self, job: MergeJob) -> MergeJob:
        """The job for the task's own node; raises NotShared, or MergeError if other packages are installed."""
        if not os.path.exists(self.nonce):  # also true if permissions hide it
            raise NotShared(str(self.nonce.parent))
        if (found := versions()) != self.versions:
            raise MergeError(
                f"{socket.gethostname()} has {found}, the export's node {self.versions}; install the same everywhere."
            )
        if ray.get_runtime_context().get_node_id() == self.node:
            return job
        for path in (file for file in job.manifest.files if isinstance(file, Path)):
            try:
                (seen,) = stats([path])
            except SourceError:
                raise NotShared(str(path)) from None
            if seen[2:] != self.files[path]:
                raise NotShared(str(path))
        return replace(job, cached=False, read_again=False)  # this node does nothing else with the file


@dataclass(frozen=True)
class _Run:
    home: Home
    refs: list[Any]


@dataclass
class _Attempt:
    job: MergeJob
    ref: Any
    number: int
    submitted: float
    started: Path
    cpus: float
    placed: bool
    here: bool
    losses: int
    patience_s: float


class RayRunner:
    """Runs merge jobs as Ray tasks, at most `workers` at a time.

    A task not scheduled within `schedule_timeout_s` seconds, or within two if no CPU is free, is submitted again
    without a CPU slot (verl's placement groups may hold every CPU until the end), and so are all later ones of
    this runner. After the same wait again it is submitted without the `placement`, which is `resources` and
    `labels` of Ray nodes. Tasks without a placement go to the node with most of their bytes.
    """

    def __init__(
        self,
        workers: int | None,
        num_cpus: float,
        schedule_timeout_s: float,
        placement: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.workers = workers or 4
        self.num_cpus = num_cpus
        self.schedule_timeout_s = schedule_timeout_s
        self.placement = placement
        self.node = ray.get_runtime_context().get_node_id()
        # When memory is short, Ray kills the newest task first, before 2.56 retriable ones, so ours are retriable.
        # They are repeated here nevertheless: each attempt needs its own marker, file and time-out.
        self.task = ray.remote(num_gpus=0, max_retries=1)(merge_task)

    def run(self, jobs: Sequence[MergeJob], progress: Callable[[int], None]) -> list[WrittenFile]:
        """Writes all files; raises a job's error, or MergeError if a worker was lost for good."""
        folder = jobs[0].path.parent
        nonce = folder / f".nonce-{uuid.uuid4().hex}"
        nonce.touch()
        waiting, running, written, refs = list(jobs)[::-1], [], {}, []
        try:
            run = _Run(Home.here(jobs, nonce), refs)
            while waiting or running:
                while waiting and len(running) < self.workers:
                    running.append(self._submit(waiting.pop(), run, 1))
                running, done = self._collect(running, run)
                progress(0)  # raises if nobody waits any more
                for file in done:
                    progress(file.nbytes)
                    written[file.name] = file
        finally:
            _stop(refs)
            for path in (nonce, *folder.glob(".started-*"), *folder.rglob("*.part*")):
                path.unlink(missing_ok=True)
        return [written[job.planned.name] for job in jobs]

    def _submit(self, job: MergeJob, run: _Run, number: int, here: bool = False, losses: int = 0) -> _Attempt:
        part = job.path.with_name(f"{job.path.name}.part{number}")
        started = run.home.nonce.with_name(f".started-{job.path.name}-{number}")
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        placement = None if here else self.placement
        if placement is not None:
            options |= _wanted(placement)
        elif node := self.node if here else _holder(job):
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=not here)
        busy = self.num_cpus and ray.available_resources().get("CPU", 0) < self.num_cpus
        patience_s = min(_SOON_S, self.schedule_timeout_s) if busy else self.schedule_timeout_s
        ref = self.task.options(**options).remote(replace(job, path=part), run.home, str(started))
        run.refs.append(ref)
        submitted, placed = time.monotonic(), placement is not None
        return _Attempt(job, ref, number, submitted, started, self.num_cpus, placed, here, losses, patience_s)

    def _collect(self, running: Iterable[_Attempt], run: _Run) -> tuple[list[_Attempt], list[WrittenFile]]:
        by_ref = {a.ref: a for a in running}
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=_POLL_S)
        left, done = [], []
        for ref, attempt in by_ref.items():
            if ref not in ready:
                left.append(self._impatient(attempt, run))
                continue
            try:
                done.append(_finish(attempt, ray.get(ref)))
            except RayTaskError as e:
                left.append(self._answer(attempt, run, e))
            except RayError as e:
                left.append(self._again(attempt, run, e))
        return left, done

    def _answer(self, attempt: _Attempt, run: _Run, error: RayTaskError) -> _Attempt:
        """The next attempt, if the task could do nothing on its node; otherwise raises the task's error."""
        if isinstance(error.cause, Lost):
            return self._again(attempt, run, error.cause)
        if not isinstance(error.cause, NotShared):
            raise error.cause from error
        if attempt.here:
            raise MergeError(
                f"{error.cause}: not seen by a task on the export's own node; output_dir must be on a disk that "
                "Ray's workers see."
            ) from None
        logger.warning("a node does not see %s as this node does; merging on the export's node", error.cause)
        return self._submit(attempt.job, run, attempt.number + 1, True, attempt.losses)

    def _again(self, attempt: _Attempt, run: _Run, error: Exception) -> _Attempt:
        reason = str(error).strip().splitlines()[0]
        if attempt.losses == _RETRIES:
            raise MergeError(
                f"{attempt.job.path.name}: the merge task was lost {_RETRIES + 1} times: {reason}"
            ) from error
        logger.warning("the merge task of %s was lost and is run again: %s", attempt.job.path.name, reason)
        return self._submit(attempt.job, run, attempt.number + 1, attempt.here, attempt.losses + 1)

    def _impatient(self, attempt: _Attempt, run: _Run) -> _Attempt:
        """The attempt, or, if it was not started in time, another one that asks for less."""
        waited = time.monotonic() - attempt.submitted
        if waited < attempt.patience_s or attempt.started.exists():
            return attempt
        if attempt.cpus:
            self.num_cpus = 0
            why, less = "no free CPU slot for it (verl's workers hold them)", "num_cpus=0"
        elif attempt.placed:
            why, less = f"no node takes it with merge.placement={self.placement}", "no placement"
            self.placement = None
        else:
            return attempt
        logger.info("%s: within %.0f s %s: continuing with %s", attempt.job.path.name, waited, why, less)
        ray.cancel(attempt.ref, force=False)
        return self._submit(attempt.job, run, attempt.number + 1, attempt.here, attempt.losses)


def _stop(refs: list[Any]) -> None:
    """Stops these attempts, so that none writes into the staging directory any more."""
    if not refs:
        return
    # Cancelling a task that has just finished can abort the whole process (Ray 2.60), so finished ones are skipped.
    _, running = ray.wait(refs, num_returns=len(refs), timeout=0)
    for ref in running:
        ray.cancel(ref, force=False)
    if running:
        ray.wait(running, num_returns=len(running), timeout=_CANCEL_S)


def _wanted(placement: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ray's options for a placement."""
    options = {"resources": dict(placement["resources"]), "label_selector": dict(placement["labels"])}
    return {key: value for key, value in options.items() if value}


def _holder(job: MergeJob) -> str | None:
    """The node with most of the bytes that a job reads; None if every node has them, or none has most."""
    if all(isinstance(file, Path) for file in job.manifest.files):
        return None
    held: Counter[str | None] = Counter()
    for entry in job.manifest.tensors.values():
        for shard in entry.shards:
            for i in range(shard.count):
                file = job.manifest.files[shard.file + i * shard.stride]
                held[getattr(file, "node", None)] += math.prod(shard.shape) * ITEMSIZE[entry.dtype]
    node, nbytes = held.most_common(1)[0] if held else (None, 0)
    return node if nbytes > held.total() / 2 else None


def _finish(attempt: _Attempt, written: WrittenFile) -> WrittenFile:
    attempt.job.path.with_name(f"{attempt.job.path.name}.part{attempt.number}").rename(attempt.job.path)
    return written


def merge_task(job: MergeJob, home: Home, started: str) -> WrittenFile:
    """Proves in a Ray worker that its node sees the same files as the export's node, then writes the file."""
    try:
        job = home.compared(job)
        Path(started).touch(exist_ok=False)
        with one_torch_thread():
            return job.run()
    except FileExistsError:
        raise Lost("its worker was killed, for memory or from outside") from None
    finally:  # an error's traceback may keep the job for as long as this process lives
        for file in job.manifest.files:
            if not isinstance(file, Path):
                file.let_go()

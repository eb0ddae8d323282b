"""Merge jobs as Ray tasks: no GPU, anywhere that sees the staging directory, never waiting for ever."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_autoexport import __version__
from verl_autoexport.errors import MergeError
from verl_autoexport.export.merge import MergeJob, WrittenFile
from verl_autoexport.runtime.handover import let_go

logger = logging.getLogger(__name__)
_POLL_S = 1.0
_CANCEL_S = 10.0
_RETRIES = 3
_PACKAGES = ("torch", "transformers")


class NotShared(Exception):
    """The task's node does not see the staging directory."""


@dataclass
class _Attempt:
    job: MergeJob
    ref: Any
    number: int
    submitted: float
    started: Path
    cpus: float
    here: bool
    losses: int


class RayRunner:
    """Runs merge jobs as Ray tasks, at most `workers` at a time.

    A task not scheduled within `schedule_timeout_s` seconds is submitted again without a
    CPU slot (verl's placement groups may hold every CPU until the end), and so are all
    later ones of this runner.
    """

    def __init__(self, workers: int | None, num_cpus: float, schedule_timeout_s: float) -> None:
        self.workers = workers or 4
        self.num_cpus = num_cpus
        self.schedule_timeout_s = schedule_timeout_s
        self.node = ray.get_runtime_context().get_node_id()
        # Retried here and not by Ray: each attempt needs its own marker and file, and its own time-out.
        self.task = ray.remote(num_gpus=0, max_retries=0)(merge_task)
        self.refs: list[Any] = []

    def run(self, jobs: Sequence[MergeJob], progress: Callable[[int], None]) -> list[WrittenFile]:
        """Write all files; raises what a job raised, MergeError when a worker was lost for good."""
        folder = jobs[0].path.parent
        nonce = folder / f".nonce-{uuid.uuid4().hex}"
        nonce.touch()
        waiting, running, written = list(jobs)[::-1], [], {}
        self.refs = []
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    running.append(self._submit(waiting.pop(), nonce, 1))
                running, done = self._collect(running, nonce)
                for file in done:
                    progress(file.nbytes)
                    written[file.name] = file
        finally:
            self._stop()
            for path in (nonce, *folder.glob(".started-*"), *folder.rglob("*.part*")):
                path.unlink(missing_ok=True)
        return [written[job.planned.name] for job in jobs]

    def _stop(self) -> None:
        """No attempt of this run may write into the staging directory any more."""
        for ref in self.refs:
            ray.cancel(ref, force=False)
        if self.refs:
            ray.wait(self.refs, num_returns=len(self.refs), timeout=_CANCEL_S)

    def _submit(self, job: MergeJob, nonce: Path, number: int, here: bool = False, losses: int = 0) -> _Attempt:
        part = job.path.with_name(f"{job.path.name}.part{number}")
        started = nonce.with_name(f".started-{job.path.name}-{number}")
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        if here:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.node, soft=False)
        ref = self.task.options(**options).remote(replace(job, path=part), str(nonce), str(started), versions())
        self.refs.append(ref)
        return _Attempt(job, ref, number, time.monotonic(), started, self.num_cpus, here, losses)

    def _collect(self, running: Iterable[_Attempt], nonce: Path) -> tuple[list[_Attempt], list[WrittenFile]]:
        by_ref = {a.ref: a for a in running}
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=_POLL_S)
        left, done = [], []
        for ref, attempt in by_ref.items():
            if ref not in ready:
                left.append(self._impatient(attempt, nonce))
                continue
            try:
                done.append(_finish(attempt, ray.get(ref)))
            except NotShared:
                if attempt.here:
                    raise MergeError(f"{nonce.parent}: not visible to a task on the export actor's own node.") from None
                logger.warning("a node does not see %s; merging on the export actor's node", nonce.parent)
                left.append(self._submit(attempt.job, nonce, attempt.number + 1, True, attempt.losses))
            except ray.exceptions.RayTaskError as e:
                raise e.cause from e
            except ray.exceptions.RayError as e:
                left.append(self._again(attempt, nonce, e))
        return left, done

    def _again(self, attempt: _Attempt, nonce: Path, error: Exception) -> _Attempt:
        reason = str(error).strip().splitlines()[0]
        if attempt.losses == _RETRIES:
            raise MergeError(
                f"{attempt.job.path.name}: the merge task was lost {_RETRIES + 1} times: {reason}"
            ) from error
        logger.warning("the merge task of %s was lost and is run again: %s", attempt.job.path.name, reason)
        return self._submit(attempt.job, nonce, attempt.number + 1, attempt.here, attempt.losses + 1)

    def _impatient(self, attempt: _Attempt, nonce: Path) -> _Attempt:
        waited = time.monotonic() - attempt.submitted
        if attempt.cpus == 0 or waited < self.schedule_timeout_s or attempt.started.exists():
            return attempt
        logger.warning(
            "no free CPU slot for %s within %.0f s (verl's workers hold them): going on with num_cpus=0",
            attempt.job.path.name,
            waited,
        )
        ray.cancel(attempt.ref, force=False)
        self.num_cpus = 0
        return self._submit(attempt.job, nonce, attempt.number + 1, attempt.here, attempt.losses)


def _finish(attempt: _Attempt, written: WrittenFile) -> WrittenFile:
    attempt.job.path.with_name(f"{attempt.job.path.name}.part{attempt.number}").rename(attempt.job.path)
    return written


def merge_task(job: MergeJob, nonce: str, started: str, expected: dict[str, str | None]) -> WrittenFile:
    """In a Ray worker: prove that this node sees the staging directory, then write the file."""
    if not Path(nonce).exists():
        raise NotShared(nonce)
    if (found := versions()) != expected:
        raise MergeError(f"this node has {found}, the export actor's has {expected}; install the same everywhere.")
    Path(started).touch()
    try:
        return job.run()
    finally:
        let_go(job.manifest.files)


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide what is written."""
    found: dict[str, str | None] = {"verl_autoexport": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found

"""Merge jobs in threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event, Lock

from verl_autoexport.errors import MergeError
from verl_autoexport.merge.job import MergeJob, WrittenFile, one_torch_thread
from verl_autoexport.system.cpus import cores

_THREADS = 2  # per file; more would wait for each other's hashing


class LocalRunner:
    """Merges in this process, `workers` files at a time, each with `threads`; by default two if cores are free.

    The slow operations (reading, casting, writing, hashing) release the GIL.
    """

    def __init__(self, workers: int | None = None, threads: int | None = None) -> None:
        self.cores = cores()
        self.workers = workers or min(4, self.cores)
        self.threads = threads

    def run(self, jobs: Sequence[MergeJob], progress: Callable[[int], None]) -> list[WrittenFile]:
        workers = min(self.workers, len(jobs))
        threads = self.threads or max(1, min(_THREADS, self.cores // workers))
        jobs = [replace(job, threads=threads) for job in jobs]
        with one_torch_thread():
            return [job.run(progress) for job in jobs] if workers == 1 else _run_beside(jobs, progress, workers)


def _run_beside(jobs: Sequence[MergeJob], progress: Callable[[int], None], workers: int) -> list[WrittenFile]:
    lock, failed = Lock(), Event()

    def advance(nbytes: int) -> None:
        with lock:
            progress(nbytes)
        if failed.is_set():
            raise MergeError("given up, because another file could not be written.")

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(job.run, advance) for job in jobs]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            if errors := [error for future in done if (error := future.exception())]:
                raise errors[0]
            return [future.result() for future in running]
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Comparing shard files with their check sums, in a process of its own: planning needs this one's GIL meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from verl_autoexport import child
from verl_autoexport.errors import SourceError
from verl_autoexport.sources.base import Check
from verl_autoexport.sources.torch_archive import check_sums

_ONE, _WHOLE, _DAMAGED = "bytes: ", "whole: all", "damaged: "
"""How its line for each file begins, and its last one where every file is what was saved, and where one is not."""


class SumCheck(Check):
    """Reads `paths` whole from now on. The process ends with this one, however that ends."""

    def __init__(self, paths: Sequence[Path]) -> None:
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                child.command(__name__), stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=child.environment(),
                encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as e:
            raise SourceError(f"{paths[0].parent}: no process to compare check sums can be started: {e}") from e
        self.where = paths[0].parent
        with suppress(BrokenPipeError):  # `wait` tells why
            self.process.stdin.write(json.dumps([str(path.absolute()) for path in paths]) + "\n")
            self.process.stdin.flush()  # and not closed: its end is ours

    def wait(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        said = "it said nothing"
        for line in self.process.stdout:
            said = line.strip() or said
            if said.startswith(_ONE):
                progress(int(said.removeprefix(_ONE)))
        code = self.process.wait()
        if said.startswith(_DAMAGED):
            raise SourceError(said.removeprefix(_DAMAGED))
        if code or said != _WHOLE:
            raise SourceError(
                f"{self.where}: the process that compares check sums ended with {code}: {said}. What is not "
                "checked is not published; export the step again."
            )

    def stop(self) -> None:
        self.process.kill()

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError), self.process:  # closes the pipes
            self.stop()


def main() -> None:
    paths = [Path(path) for path in json.loads(sys.stdin.readline())]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cores = len(os.sched_getaffinity(0))
    pool, last = ThreadPoolExecutor(min(4, max(1, cores - 1))), _WHOLE
    try:
        running = {pool.submit(check_sums, path): path for path in paths}
        for done in as_completed(running):
            done.result()
            print(f"{_ONE}{running[done].stat().st_size}", flush=True)
    except SourceError as e:
        last = _DAMAGED + " ".join(str(e).splitlines())
    print(last, flush=True)
    os._exit(0)  # not after files that are still read


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()

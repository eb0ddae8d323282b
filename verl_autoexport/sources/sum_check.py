"""Comparing shard files with their check sums, in a process of its own: planning needs this one's GIL meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.base import Check
from verl_autoexport.sources.torch_archive import check_sums

_DAMAGED = 3
"""Exit code of the process where a file is not what was saved; it prints which."""


class SumCheck(Check):
    """Reads `paths` whole from now on. The process ends with this one, however that ends."""

    def __init__(self, paths: Sequence[Path]) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=env, text=True
            )
        except OSError as e:
            raise SourceError(f"no process to compare the shards' check sums can be started: {e}") from e
        with suppress(BrokenPipeError):  # `wait` tells why
            self.process.stdin.write(json.dumps([str(path.absolute()) for path in paths]) + "\n")
            self.process.stdin.flush()  # and not closed: its end is ours

    def wait(self) -> None:
        said = self.process.stdout.read().strip()
        code = self.process.wait()
        if code == _DAMAGED:
            raise SourceError(said)
        if code:
            last = said.splitlines()[-1] if said else "it said nothing"
            raise SourceError(f"the process that compares the shards' check sums ended with {code}: {last}.")

    def stop(self) -> None:
        self.process.kill()

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes the pipes
            self.stop()


def main() -> int:
    paths = [Path(path) for path in json.loads(sys.stdin.readline())]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(min(4, max(1, cores - 1)))
    try:
        for done in as_completed([pool.submit(check_sums, path) for path in paths]):
            done.result()
    except SourceError as e:
        print(e, flush=True)
        os._exit(_DAMAGED)  # not after the other files
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

"""The exporter in a process of its own with low priority, for trainers without Ray."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, BinaryIO

from verl_autoexport.config.schema import AutoExportConfig
from verl_autoexport.errors import SourceError
from verl_autoexport.service.request import ExportRequest, Outcome
from verl_autoexport.system.subprocesses import command, environment

_NICE = 19
_RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""torchrun's variables, by which libraries would take the exporter for a rank of the training."""


class ProcessExportService:
    """For checkpoints on this machine; snapshots need Ray. A process that was lost is replaced by the next request.

    Requests and outcomes are pickled: both ends are this package in one environment, and the pipes are private.
    """

    receiver = None

    def __init__(self, settings: AutoExportConfig, owner: str | None = None) -> None:
        self.settings, self.owner = settings, owner
        self.lock = threading.Lock()
        self.child: _Child | None = None

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        with self.lock:
            if self.child is None or not self.child.alive:
                self.child = _Child(self.settings, self.owner)
            return self.child.submit(request)

    def expect(self, snapshot: str) -> None:
        raise SourceError(f"snapshot {snapshot}: an exporter without Ray takes checkpoints only.")

    def close(self) -> None:
        if self.child is not None:
            self.child.process.kill()


class _Child:
    """The process, and the outcomes that are expected of it."""

    def __init__(self, settings: AutoExportConfig, owner: str | None) -> None:
        env = {k: v for k, v in environment().items() if k not in _RANK_NAMES} | {"CUDA_VISIBLE_DEVICES": ""}
        answers, theirs = os.pipe()
        self.process = subprocess.Popen(
            command(__name__, str(theirs)), env=env, stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=(theirs,)
        )
        os.close(theirs)
        self.open: dict[int, tuple[ExportRequest, Future[Outcome]]] = {}
        self.lock = threading.Lock()
        self.alive, self.sent = True, 0
        self._send((settings, owner))
        threading.Thread(target=self._receive, args=(os.fdopen(answers, "rb"),), name="autoexport", daemon=True).start()

    def submit(self, request: ExportRequest) -> Future[Outcome]:
        done: Future[Outcome] = Future()
        with self.lock:
            self.sent += 1
            if self.alive:
                self.open[self.sent] = request, done
                self._send((self.sent, request))
            else:
                done.set_result(self._lost(request))
        return done

    def _send(self, message: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `_receive` sees the end of the process, too
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def _receive(self, answers: BinaryIO) -> None:
        with suppress(EOFError, pickle.UnpicklingError):  # killed, perhaps in the middle of an answer
            while True:
                number, outcome = pickle.load(answers)
                self.open.pop(number)[1].set_result(outcome)
        self.process.wait()
        with self.lock:
            self.alive = False
        for request, done in self.open.values():
            done.set_result(self._lost(request))

    def _lost(self, request: ExportRequest) -> Outcome:
        reason = f"the export process ended with exit code {self.process.poll()}"
        return Outcome(request.step, "failed", reason=reason, lost=True)


def _serve(answers: BinaryIO) -> None:
    """Exports what comes in on stdin, until its other end is closed."""
    from verl_autoexport.service.local_service import LocalExportService

    os.nice(_NICE)
    settings, owner = pickle.load(sys.stdin.buffer)
    service, lock = LocalExportService(settings, owner), threading.Lock()

    def answer(number: int, done: Future[Any]) -> None:
        with lock:
            pickle.dump((number, done.result()), answers)
            answers.flush()

    with suppress(EOFError):
        while True:
            number, request = pickle.load(sys.stdin.buffer)
            service.submit(request).add_done_callback(lambda done, number=number: answer(number, done))
    os._exit(0)  # training has ended without waiting; the next start takes up what is unfinished


if __name__ == "__main__":
    _serve(os.fdopen(int(sys.argv[1]), "wb"))

"""Short exports that are killed with SIGKILL at chosen system calls, and a reader that looks all along.

`python -m tests.support.chaos zygote ROOT SOURCE` has imported everything and forks one process for each line on
stdin: a training run that saves, holds and exports a few steps with the package's own holds, lease, export actor and
registry, with merges in processes of their own. `… reader ROOT` checks the hashes of whatever it can see, until stdin
ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry.record import RECORD
from verl_autoexport.registry.store import Registry
from verl_autoexport.system.durable_files import is_temp

PHASES = ("hold", "stage", "write", "verify", "publish", "pointers", "retention")
CALLS = frozenset({
    "open", "read", "write", "fsync", "rename", "replace", "link", "symlink", "mkdir", "rmdir", "unlink", "remove",
    "stat", "lstat", "fstat", "listdir", "scandir", "sendfile", "close", "truncate",
})  # fmt: skip


class Killer:
    """Kills the process that makes the `index`-th of `CALLS` in `phase`, once; counts them where `phase` is None."""

    def __init__(
        self, marker: Path, phase: str | None = None, index: int = 0, after: bool = False, merge: bool = False
    ):
        self.marker, self.phase, self.index, self.after, self.merge = marker, phase, index, after, merge
        self.main = os.getpid()
        self.counts: Counter[str] = Counter()
        self.stack = threading.local()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            outer, before = getattr(self.stack, "phase", None), sys.getprofile()
            self.stack.phase = phase
            sys.setprofile(self.probe)
            try:
                return original(*args, **kwargs)
            finally:
                sys.setprofile(before)
                self.stack.phase = outer

        setattr(owner, name, watched)

    def probe(self, frame: Any, event: str, arg: Any) -> None:
        if event not in ("c_call", "c_return") or arg.__name__ not in CALLS:
            return
        phase = self.stack.phase
        if event == "c_call":
            self.counts[phase] += 1
        here = phase == self.phase and (os.getpid() != self.main) == self.merge
        if here and self.counts[phase] == self.index and self.after == (event == "c_return"):
            with suppress(FileExistsError):
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)


class ForkedMerges:
    """Each merge in a process of its own, run again when that is killed, as Ray tasks are."""

    def run(self, jobs: Any, progress: Any) -> list[Any]:
        return [self._until_done(job) for job in jobs]

    def _until_done(self, job: Any) -> Any:
        for number in range(1, 5):
            part = job.path.with_name(f"{job.path.name}.part{number}")
            source, sink = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    os.write(sink, pickle.dumps(replace(job, path=part).run()))
                finally:
                    os._exit(0)
            os.close(sink)
            with open(source, "rb") as file:
                result = file.read()
            os.waitpid(pid, 0)
            if result:
                part.rename(job.path)
                return pickle.loads(result)
            part.unlink(missing_ok=True)
        raise AssertionError("killed more than once")


def train(root: Path, source: Path, steps: int, killer: Killer) -> None:
    """What a run does from its start on: finish what was interrupted, then `steps` more steps, each a milestone."""
    from verl_autoexport.config.reading import load_config
    from verl_autoexport.service.exporter import Exporter
    from verl_autoexport.sources import holds

    settings = load_config({"output_dir": str(root / "exports"), "verify": {"load": False}, "keep": {"last": 2}})
    registry = Registry.create(settings.output_dir)
    lease = registry.own("chaos")
    instrument(killer)
    actor = Exporter(settings, ForkedMerges(), lease.token)
    known = {m.step for m in registry.milestones()}
    trained = max((step_of(p) for p in root.glob("global_step_*")), default=0)
    found = holds.find_holds(root)
    if trained and trained not in known | {p.step for p in found}:
        found.append(holds.make_hold(root / f"global_step_{trained}", trained, "actor"))
    for hold in found:
        export(actor, hold)
    for step in range(trained + 1, trained + 1 + steps):
        folder = root / f"global_step_{step}"
        shutil.copytree(source, folder.with_suffix(".saving"))
        folder.with_suffix(".saving").rename(folder)
        hold = holds.make_hold(folder, step, "actor")
        for old in (p for p in root.glob("global_step_*") if p != folder):
            shutil.rmtree(old)  # as with max_actor_ckpt_to_keep=1: from here on the links are the only source
        export(actor, hold)
    lease.release()


def export(actor: Any, hold: Any) -> None:
    from verl_autoexport.sources import holds

    request = request_for(hold)
    holds.choose(hold, request.to_json())
    outcome = actor.export(request)
    assert outcome.status == "published", outcome


def request_for(hold: Any) -> Any:
    """As the controller makes it."""
    from verl_autoexport.milestones.events import Decision, StepEvent, Trigger
    from verl_autoexport.service.request import RunInfo, make_request

    decision = Decision(hold.step, time.time(), (Trigger("at_steps", "chaos"),))
    return make_request(RunInfo(hold.path, run={}), decision, StepEvent(hold.step, {}, 0.0), hold, 0.0)


def instrument(killer: Killer) -> None:
    from verl_autoexport.export import pipeline
    from verl_autoexport.merge import job as merge
    from verl_autoexport.registry import staging
    from verl_autoexport.sources import holds

    for owner, name, phase in (
        (holds, "make_hold", "hold"), (holds, "choose", "hold"), (staging, "create", "stage"),
        (merge.MergeJob, "run", "write"), (merge.FileWriter, "write", "write"), (pipeline, "_write_beside", "write"),
        (pipeline, "_verify", "verify"), (pipeline, "make_record", "verify"), (Registry, "publish", "publish"),
        (Registry, "_book", "pointers"), (Registry, "prune", "retention"),
    ):  # fmt: skip
        killer.watch(owner, name, phase)


def step_of(path: Path) -> int:
    found = re.fullmatch(r"global_step_(\d+)", path.name)
    return int(found[1]) if found else 0


def warm_up(source: Path, once: Path) -> None:
    """Import everything that an export needs; transformers imports a model's code when it is first asked for."""
    import torch

    import verl_autoexport.service.exporter  # noqa: F401
    from verl_autoexport.export import pipeline, spec
    from verl_autoexport.merge.local_runner import LocalRunner

    torch.set_num_threads(1)
    pipeline.export_to_directory(spec.checkpoint_spec(source, verify=False), once, LocalRunner(1))


def zygote(root: Path, source: Path) -> None:
    warm_up(source, root.parent / "warm")
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        marker, counts = root.parent / f"killed-{number}", root.parent / "counts.json"
        if (pid := os.fork()) == 0:
            try:
                killer = Killer(marker, **order["kill"])
                train(root, source, order["steps"], killer)
                counts.write_text(json.dumps(killer.counts))
                os._exit(0)
            except BaseException:  # noqa: BLE001 - told, then the process ends
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "killed": marker.exists()}), flush=True)


def look(root: Path) -> tuple[int, list[str]]:
    """How many versions were read whole, and what was wrong with one that is still there."""
    looked, wrong = 0, []
    registry = Registry(root)
    for version in registry.versions():
        problem = _problem(version.path, version.record)
        looked += problem is None
        if problem and any(v.path == version.path for v in registry.versions()):  # retention may have taken it
            wrong.append(problem)
    for link in [p for p in root.iterdir() if p.is_symlink()]:
        target = os.readlink(link)
        if not (root / target / RECORD).exists() and link.is_symlink() and os.readlink(link) == target:
            wrong.append(f"{link} -> {target}: no version")
    return looked, wrong


def _problem(path: Path, record: Any) -> str | None:
    try:
        for file in record.files:
            if hashlib.sha256((path / file["name"]).read_bytes()).hexdigest() != file["sha256"]:
                return f"{path / file['name']}: wrong content"
        names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {RECORD}
        if extra := names - {f["name"] for f in record.files}:
            return f"{path}: not in the record: {extra}"
    except OSError as e:
        return f"{path}: {e}"
    return None


def reader(root: Path) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    looked, looks, wrong, linked = 0, 0, [], False
    while not ended.is_set():
        if linked and not os.path.lexists(root / "latest"):
            wrong.append("latest: was there, and is not")
        linked = linked or os.path.lexists(root / "latest")
        with suppress(FileNotFoundError, RegistryError):
            n, problems = look(root)
            looked, looks, wrong = looked + n, looks + 1, wrong + problems
        time.sleep(0.005)
    print(json.dumps({"looks": looks, "versions": looked, "wrong": wrong}), flush=True)


def leftovers(root: Path) -> list[str]:
    """Whatever a crash may leave in a run's directory: staged, removed and temporary files, links."""
    exports = root / "exports"
    found = [*(exports / ".staging").iterdir(), *(exports / ".trash").iterdir(), *(root / ".autoexport").glob("*")]
    return [str(p) for p in (*found, *(p for p in root.rglob("*") if is_temp(p.name) or p.suffix == ".tmp"))]


if __name__ == "__main__":
    {"zygote": zygote, "reader": reader}[sys.argv[1]](*map(Path, sys.argv[2:]))

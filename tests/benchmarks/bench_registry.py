"""What a long life costs: many versions, a long journal, many requests.

`python -m tests.benchmarks.bench_registry [VERSIONS [LINES]]`: real files on the disk of the temporary directory, small
ones. What training waits for is `decide`, a look for requests, and how long the lock is held.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_autoexport.config.reading import load_config
from verl_autoexport.milestones.events import Milestone, StepEvent, Trigger
from verl_autoexport.milestones.triggers import History, RunStart, build_policies, decide
from verl_autoexport.registry import compaction, journal
from verl_autoexport.registry.lock import RootLock
from verl_autoexport.registry.requests import take
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry
from verl_autoexport.registry.versions import version_name

METRIC = "val-core/x/acc/mean@1"
REQUESTS = 100_000


def make(root: Path, versions: int, lines: int) -> None:
    """As a run leaves it: a journal line when a step is asked for and when it is published, and reports."""
    Registry.create(root)
    entries: list[tuple[str, dict[str, Any]]] = []
    for step in range(1, versions + 1):
        name = version_name(step, step)
        triggers = [
            {"policy": "best", "reason": "better", "name": "best", "metric": METRIC, "value": step % 97, "mode": "max"}
        ]
        (root / name).mkdir()
        (root / name / "model.safetensors").write_bytes(b"x")
        record = {
            "schema_version": 1, "version": step, "step": step, "created_at": "2025-01-02T03:04:05+00:00", "run": {},
            "triggers": triggers, "metrics": {METRIC: step % 97} | {f"m{i}": i / 3 for i in range(50)},
            "measured_on": None, "source": {"fingerprint": "f"}, "base_model": None, "architectures": ["A"],
            "dtype": "bfloat16", "num_parameters": 1, "versions": {}, "timings_s": {"merge": 1.0},
            "files": [{"name": "model.safetensors", "bytes": 1, "sha256": "0"}],
            "verification": {"load": {"status": "passed", "detail": ""}},
        }  # fmt: skip
        (root / name / "export.json").write_text(json.dumps(record))
        entries += [("asked", {"step": step, "triggers": triggers}), ("published", {"step": step, "version": name})]
    entries += [("failed", {"step": 1 + i % versions, "reason": "again"}) for i in range(lines - len(entries))]
    journal.append_all(root / journal.NAME, entries)
    Registry(root).refresh_pointers()


class Seconds(float):
    """By the clock; `cpu` are those that this process had a CPU, which tell more on a busy machine."""

    cpu: float | None = None


def row(what: str, seconds: float, goal: str = "") -> None:
    cpu = getattr(seconds, "cpu", None)
    print(f"{what:44} {show(seconds)}   {show(cpu) + ' of CPU' if cpu is not None else '':20}  {goal}", flush=True)


def show(seconds: float) -> str:
    return f"{seconds:9.2f} s " if seconds >= 0.1 else f"{1000 * seconds:9.3f} ms"


def timed(call: Callable[..., Any], *args: Any, loops: int = 1) -> Seconds:
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(loops):
        call(*args)
    cpu = time.process_time() - cpu
    found = Seconds((time.perf_counter() - began) / loops)
    found.cpu = cpu / loops
    return found


@contextmanager
def watched():
    """The seconds that the lock was held, each time."""
    held: list[float] = []
    acquire, release = RootLock.acquire, RootLock.release

    def begin(lock: RootLock, timeout_s: float) -> None:
        acquire(lock, timeout_s)
        held.append(-time.perf_counter())

    def end(lock: RootLock) -> None:
        held[-1] += time.perf_counter()
        release(lock)

    RootLock.acquire, RootLock.release = begin, end
    try:
        yield held
    finally:
        RootLock.acquire, RootLock.release = acquire, release


def bench_start(root: Path) -> None:
    def start() -> None:
        registry = Registry.create(root)
        registry.recover()
        registry.milestones()

    row("start: create, recover, milestones", timed(start), "goal 2 s")
    row(
        "ls: versions, milestones, outcomes",
        timed(lambda r: (r.versions(), r.milestones(), r.outcomes()), Registry(root)),
    )


def bench_publish(root: Path, versions: int) -> None:
    registry = Registry.create(root)
    registry.versions()

    def publish(step: int) -> None:
        staged = registry.stage("x")
        (staged.path / "model.safetensors").write_bytes(b"x")
        registry.publish(staged, replace(record, step=step))

    record = registry.find("1").record
    with watched() as held:
        row("publish one more", timed(publish, versions + 1))
        row("  the lock is held for at most", max(held))
        row("prune, nothing to remove", timed(registry.prune, Keep(last=10 * versions)))
        row("  the lock is held for at most", max(held))


def bench_prune(root: Path, versions: int) -> None:
    registry = Registry(root)
    row("judge by max_bytes, half of them go", timed(registry.plan_retention, Keep(max_bytes=versions // 2)))
    with watched() as held:
        row(f"prune, {versions // 2} removed", timed(registry.prune, Keep(last=versions // 2)), "goal 30 s for 5000")
        row("  the lock is held for at most", max(held))
        row("  and in the middle for", sorted(held)[len(held) // 2])


def bench_journal(root: Path) -> None:
    registry = Registry(root)
    registry.milestones()
    size = os.path.getsize(root / journal.NAME)
    registry._notes.worth_a_look = 0
    row("compact the journal", timed(compaction.compact, registry._notes, registry._locked))
    print(f"  {size / 1e6:.1f} MB before, {os.path.getsize(root / journal.NAME) / 1e6:.1f} MB after")


def bench_decide(milestones: int) -> None:
    best = [{"metric": METRIC, "mode": "max"}, {"metric": "val-core/*/acc/mean@1", "mode": "min", "name": "low"}]
    node = {"every_n_steps": 10, "every_seconds": 600, "best": best, "threshold": {"metric": METRIC, "above": 2.0}}
    policies = build_policies(load_config({"output_dir": "/tmp/x", "trigger": node}).trigger)
    reasons = (
        Trigger("every_n_steps", "x"),
        Trigger("every_seconds", "x"),
        Trigger("best", "x", "best", METRIC, 1.0, "max"),
    )
    history = History(Milestone(step, float(step), reasons, "published") for step in range(1, milestones))
    metrics = {f"m{i}": float(i) for i in range(100)} | {METRIC: 0.5}
    event, start = StepEvent(milestones + 1, metrics, float(milestones)), RunStart(0, 0.0)
    once = timed(decide, policies, event, history, start, loops=1000)
    row(f"decide, {milestones} milestones", once, "goal 0.1 ms")
    row("take one more in", timed(history.remember, Milestone(milestones + 1, 1.0, reasons)))


def bench_requests(folder: Path) -> None:
    folder.mkdir()
    row("look for requests, none", timed(take, folder))
    for number in range(REQUESTS):
        os.close(os.open(folder / f"{number}.json", os.O_CREAT | os.O_WRONLY))
    row(f"take {REQUESTS} requests", timed(take, folder))


def main(versions: int = 10_000, lines: int = 100_000) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as tmp:
        root = Path(tmp, "exports")
        make(root, versions, lines)
        print(f"{versions} versions, {lines} journal lines")
        bench_start(root)
        bench_publish(root, versions)
        bench_prune(root, versions)
        bench_journal(root)
        bench_decide(versions)
        bench_requests(Path(tmp, ".requests"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Several processes at work in one output directory."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

from tests.support.registry import best, child, links, names, publish
from verl_autoexport.registry import requests
from verl_autoexport.registry.retention import Keep


def test_staging_is_kept_while_its_writer_lives(registry, root):
    writer = child(root, "staged = registry.stage('x'); print(staged.id, flush=True); time.sleep(60)")
    try:
        path = root / ".staging" / writer.stdout.readline().strip()
        assert registry.recover() == []
        assert path.is_dir()
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert registry.recover() == [f"{path}: removed, since its writer is gone"]
    assert not any((root / ".staging").iterdir())


def test_processes_and_threads_get_numbers_of_their_own(registry, root):
    code = "for i in range(6): publish(registry, i, best(i)); registry.journal('x', i=i)"
    writers = [child(root, code), child(root, code)]
    threads = [threading.Thread(target=lambda: [publish(registry, i, best(i)) for i in range(6)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(writer.poll() is None for writer in writers):
        registry.recover()  # must not take what others are writing
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.stdout.close()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [v.number for v in registry.versions()] == list(range(1, 25))
    entries, problems = registry.journal_entries()
    assert problems == []
    assert Counter(e["event"] for e in entries) == {"published": 24, "x": 12}
    assert registry.recover() == []
    assert links(root) == registry.pointers()


def test_requests_and_a_run_that_takes_them_never_miss_each_other(registry, root):
    """Processes ask all along while this one takes: each request is found once."""
    askers = [child(root, "[registry.request() for i in range(100)]") for _ in range(2)]
    found: list[str] = []
    while alive := any(asker.poll() is None for asker in askers):
        if taken := requests.take(root / ".requests"):
            found += [n for n in os.listdir(taken) if n.endswith(".json")]
    found += [p.name for p in (root / ".requests").iterdir() if p.suffix == ".json"] if not alive else []
    for asker in askers:
        asker.stdout.close()
    assert [asker.returncode for asker in askers] == [0, 0]
    assert len(set(found)) == len(found) == 200


def test_a_run_publishes_while_somebody_prunes(registry, root):
    publisher = child(root, "[publish(registry, i + 1, *[best(i)] * (i % 2)) for i in range(30)]")
    pruner = child(
        root, "from verl_autoexport.registry.retention import Keep\nwhile True: registry.prune(Keep(last=2))"
    )
    try:
        while publisher.poll() is None:
            assert registry.prune(Keep(last=2))[1] == []
    finally:
        pruner.kill()
        pruner.wait()
        for process in (publisher, pruner):
            process.stdout.close()
    assert publisher.returncode == 0
    registry.recover()
    registry.prune(Keep(last=2))
    assert names(registry) == ["v0029-step29", "v0030-step30"]
    assert registry.journal_entries()[1] == []
    assert [m.step for m in registry.milestones()] == list(range(1, 31))

"""The output directory after crashes of real processes at every change to the disk."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from tests.support.crashes import every_crash
from tests.support.registry import best, child, links, names, publish
from tests.support.retention import check_whole, fill, memory, removals
from verl_autoexport.registry import compaction, journal_reader, removal, state
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry
from verl_autoexport.system.durable_files import is_temp
from verl_autoexport.system.untrusted import read_json


@pytest.fixture
def no_sync(monkeypatch):
    """A killed process loses nothing that the kernel has; only power does."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def check_repaired(root: Path) -> Registry:
    registry = Registry(root)
    for pointer, target in links(root).items():
        assert target in names(registry), f"{pointer} points to no version"
    seen = registry.versions()
    registry.recover()
    assert registry.recover() == [], "one recovery repairs everything"
    assert registry.versions() == seen or any(v.superseded for v in registry.versions())
    assert registry.invalid() == []
    assert links(root) == registry.pointers() == read_json(root / "registry.json")["pointers"]
    assert state.load(root)[1] is None
    assert not any((root / ".staging").iterdir())
    assert not [p for p in root.iterdir() if is_temp(p.name)]
    noted = Counter(e["version"] for e in registry.journal_entries()[0] if e["event"] == "published")
    assert noted == dict.fromkeys(names(registry), 1)
    assert publish(registry, 8, best(0.99)).number == 1 + len(seen), "no gap, no number used twice"
    return registry


@pytest.mark.usefixtures("no_sync")
def test_crash_at_any_moment_of_publish(tmp_path, registry, root):
    publish(registry, 2, best(0.5))
    seen = Counter()
    for copy in every_crash(tmp_path, root, lambda r: publish(r, 4, best(0.9))):
        visible = names(Registry(copy))
        seen[len(visible)] += 1
        assert visible in (["v0001-step2"], ["v0001-step2", "v0002-step4"])
        for path in copy.glob("v*"):
            assert (path / "sub/model.safetensors").read_bytes() == b"weights"
        check_repaired(copy)
    assert min(seen[1], seen[2]) > 3, "crashes before and after the version appeared"


@pytest.mark.usefixtures("no_sync")
def test_crash_at_any_moment_of_supersede(tmp_path, registry, root):
    publish(registry, 2, best(0.5))
    publish(registry, 4, best(0.9))
    for copy in every_crash(tmp_path, root, lambda r: r.supersede_after(2)):
        Registry(copy).recover()
        Registry(copy).supersede_after(2)  # what the resumed run does after each start
        assert [v.superseded for v in Registry(copy).versions()] == [False, True]
        assert links(copy) == {"best": "v0001-step2", "latest": "v0001-step2"}
        check_repaired(copy)


@pytest.mark.usefixtures("no_sync")
def test_crash_at_any_moment_of_recover(tmp_path, registry, root):
    publish(registry, 2, best(0.5))
    publish(registry, 4)
    registry.supersede_after(2)
    staged = registry.stage("left")
    (staged.path / "part").touch()
    staged.release()
    for path in (root / "registry.json", root / "latest"):
        path.unlink()
    (root / ".latest.tmp-01234567").symlink_to("v0001-step2")
    for copy in every_crash(tmp_path, root, lambda r: r.recover()):
        check_repaired(copy)


# -- removing ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_sync")
def test_crash_at_any_moment_of_shortening_the_journal(tmp_path, registry, root, monkeypatch):
    fill(registry)
    for _ in range(40):
        registry.note([("asked", {"step": 2, "triggers": []}), ("failed", {"step": 2, "reason": "x"})])
    monkeypatch.setattr(journal_reader, "WORTH", 10)
    monkeypatch.setattr(compaction, "WORTH", 10)
    before = memory(registry)

    def shorten(registry: Registry) -> None:
        registry.prune(Keep())  # of which it is the last step
        registry.journal("x")
        registry.journal("y")
        registry.journal("z")

    sizes = set()
    for copy in every_crash(tmp_path, root, shorten):
        registry = Registry(copy)
        assert memory(registry) == before
        sizes.add(len(registry.journal_entries()[0]) > 80)
        registry.recover()
        assert not [p for p in copy.iterdir() if is_temp(p.name)]
    assert sizes == {True, False}


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("renames", [True, False])
def test_crash_at_any_moment_of_prune(tmp_path, registry, root, renames):
    def prune(registry: Registry) -> None:
        with nullcontext() if renames else no_renaming():
            registry.prune(Keep(last=2))

    fill(registry)
    before, seen = memory(registry), set()
    for nth, copy in enumerate(every_crash(tmp_path, root, prune)):
        registry = Registry(copy)
        check_whole(copy)
        seen.add(len(names(registry)))
        assert memory(registry) == before
        if nth % 2:
            (copy / "registry.json").unlink()
        registry.recover()
        assert registry.recover() == [], "one recovery finishes everything"
        check_whole(copy)
        assert memory(registry) == before
        assert {p.name for p in copy.glob("v*")} == {*names(registry)}
        assert not any(copy.glob(".trash/*"))
        registry.prune(Keep(last=2))
        assert names(registry) == ["v0001-step1", "v0002-step2", "v0004-step4", "v0005-step5"]
        events = removals(registry)
        assert {*events} == {(e, v) for e in ("removed", "deleted") for v in ("v0003-step3", "v0006-step6")}
        assert publish(registry, 9).number == 7
    assert seen == {4, 6}, "crashes before and after the decision was told to readers"


@contextmanager
def no_renaming() -> Iterator[None]:
    """A file system that renames no directories."""
    rename = os.rename
    os.rename = lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "Invalid cross-device link"))
    try:
        yield
    finally:
        os.rename = rename


@pytest.mark.usefixtures("no_sync")
def test_crash_at_any_moment_of_finishing_a_removal(tmp_path, registry, root):
    fill(registry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "resume_removals", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.prune(Keep(last=2))
    assert read_json(root / "registry.json")["removed"] == ["v0006-step6", "v0003-step3"]
    before = memory(registry)
    for copy in every_crash(tmp_path, root, lambda r: r.recover()):
        assert memory(Registry(copy)) == before
        Registry(copy).recover()
        assert Registry(copy).recover() == []
        assert names(Registry(copy)) == ["v0001-step1", "v0002-step2", "v0004-step4", "v0005-step5"]
        assert read_json(copy / "registry.json")["removed"] == []
        assert not any(copy.glob(".trash/*"))


LOOP = """
from itertools import count
from verl_autoexport.registry.retention import Keep
registry.recover()
last = max((v.step for v in registry.versions()), default=0)
for step in count(last + 1):
    print(step, flush=True)
    publish(registry, step, *[best(step)] * (step % 3 == 0), files=({"name": "sub/model.safetensors", "bytes": 7},))
    registry.prune(Keep(last=2, every_n_steps=20))
"""


class Looks(threading.Thread):
    """Reads every version, by its name and through links, again and again."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.root, self.wrong = root, []
        self.looks, self.looked, self.stop = 0, threading.Condition(), threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            for path in [*self.root.glob("v*"), *(self.root / link for link in links(self.root))]:
                with suppress(FileNotFoundError):
                    (path / "export.json").stat()
                    try:
                        good = (path / "sub/model.safetensors").read_bytes() == b"weights"
                    except FileNotFoundError:
                        good = not (path / "export.json").exists() or path.is_symlink()
                    self.wrong.extend([] if good else [path.name])
            with self.looked:
                self.looks += 1
                self.looked.notify_all()

    def wait(self, more: int) -> None:
        """Until it has looked at everything so many times more."""
        with self.looked:
            enough = self.looks + more
            assert self.looked.wait_for(lambda: self.looks >= enough, 60), "the reader has ended"


def test_readers_see_whole_versions_while_pruning_is_killed(registry, root):
    """Each process is killed wherever it is, two whole steps and some looks of the reader after its start."""
    reader = Looks(root)
    reader.start()
    try:
        for _ in range(12):
            writer = child(root, LOOP)
            begun = [int(writer.stdout.readline()) for _ in range(3)]
            assert begun[1:] == [begun[0] + 1, begun[0] + 2]
            reader.wait(20)
            writer.send_signal(signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL, "it ended by itself"
            writer.stdout.close()
            registry.recover()
            check_whole(root)
    finally:
        reader.stop.set()
        reader.join()
    assert reader.wrong == []
    registry.prune(Keep(last=2, every_n_steps=20))
    steps = [v.step for v in registry.versions()]
    published = [e["step"] for e in registry.journal_entries()[0] if e["event"] == "published"]
    assert published == list(range(1, max(steps) + 1)), "each step once"
    assert len(published) >= 2 * 12
    assert [v.number for v in registry.versions()] == steps, "no number twice, none left out"
    assert {s for s in published if s % 20 == 0} <= {*steps}
    assert {max(steps), max(steps) - 1, max(s for s in published if s % 3 == 0)} <= {*steps}
    assert len(steps) <= len(published) // 20 + 3
    assert not any(root.glob(".trash/*"))
    assert not any((root / ".staging").iterdir())

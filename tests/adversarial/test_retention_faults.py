"""Versions that cannot be deleted, and a disk that is full."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.registry import names, publish
from tests.support.retention import fill, memory, removals
from verl_autoexport.registry import state
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry


@pytest.fixture
def immovable() -> Iterator[Callable[[Path], Path]]:
    """Makes a file or directory one that not even root can delete."""
    made = []

    def change(path: Path, sign: str) -> None:
        subprocess.run(["chattr", f"{sign}i", path], check=True, capture_output=True)

    def make(path: Path) -> Path:
        try:
            change(path, "+")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("chattr +i is not permitted here")
        made.append(path)
        return path

    yield make
    for path in made:
        with suppress(OSError, subprocess.CalledProcessError):
            change(path, "-")


def release(root: Path, name: str) -> None:
    for path in [*root.glob(".trash/**/*"), *root.glob(f"{name}/**/*"), root / name]:
        subprocess.run(["chattr", "-i", path], capture_output=True)


def test_a_deletion_is_noted_only_when_the_data_is_gone(registry, root, immovable):
    fill(registry)
    immovable(root / "v0003-step3/sub/model.safetensors")
    registry.prune(Keep(last=1))
    assert ("deleted", "v0003-step3") not in removals(registry)
    assert state.load(root)[0].removed == ["v0003-step3"]
    release(root, "v0003-step3")
    registry.recover()
    assert ("deleted", "v0003-step3") in removals(registry)


@pytest.mark.parametrize("what", ["sub/model.safetensors", "sub", "export.json", "."])
def test_a_deletion_that_fails_is_recorded_and_tried_again(registry, root, immovable, what):
    fill(registry)
    before = memory(registry)
    immovable(root / "v0003-step3" / what)
    for _ in range(2):
        (line,) = registry.prune(Keep(last=1))[1]
        assert "v0003-step3" in line
        assert "removed, but its data cannot be deleted yet: Operation not permitted" in line
        assert names(registry) == ["v0001-step1", "v0002-step2", "v0005-step5"], "the others go"
        assert not [p for p in root.glob("v*/export.json") if not (p.parent / "sub/model.safetensors").exists()]
        assert registry.invalid() == []
    failures = [path for event, path in removals(registry) if event == "delete_failed"]
    assert len(failures) == 1, "noted once, not at each attempt"
    assert memory(registry) == before
    (root / "registry.json").unlink()
    assert "v0003-step3" not in names(registry), "the journal knows that it is removed"
    assert publish(registry, 7).number == 7
    assert any("cannot be deleted yet" in line for line in registry.recover())
    release(root, "v0003-step3")
    assert registry.prune(Keep(last=1))[1] == []
    assert [p.name for p in sorted(root.glob("v*"))] == ["v0001-step1", "v0002-step2", "v0007-step7"]
    assert not any(root.glob(".trash/*"))
    assert removals(registry).count(("deleted", "v0003-step3")) == 1


def test_a_version_that_is_mounted_elsewhere_is_busy(registry, root):
    fill(registry)
    path = root / "v0003-step3"
    if subprocess.run(["mount", "--bind", path, path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (line,) = registry.prune(Keep(last=1))[1]
        assert "busy" in line
        assert names(registry) == ["v0001-step1", "v0002-step2", "v0005-step5"]
    finally:
        subprocess.run(["umount", path], check=True)
    assert registry.prune(Keep(last=1))[1] == []
    assert not path.exists()


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_full_disk_can_be_pruned(tmp_path, lines):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        registry = Registry.create(disk / "exports")
        fill(registry, 8)
        before = memory(registry)
        log = registry.root / ".journal.jsonl"
        room = -log.stat().st_size % 4096  # left in its last block: make that enough for so many lines
        registry.journal("note", text="x" * ((room - lines * 500 - 100) % 4096))
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as f:
            while f.write(b"x" * 4096):
                pass
        with pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(b"x")
        assert registry.prune(Keep(last=2))[1] == []
        assert [v.step for v in registry.versions()] == [1, 2, 6, 7]
        assert memory(registry) == before
        assert {p.name for p in registry.root.glob("v*")} == {*names(registry)}
        events = {e["version"] for e in registry.journal_entries()[0] if e["event"] == "removed"}
        assert len(events) == 4, "each with its reason"
        assert state.load(registry.root)[0].next_version == 9
    finally:
        subprocess.run(["umount", disk], check=True)

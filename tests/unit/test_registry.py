"""The output directory: numbering, pointers, rollback, requests, and the repair of damage."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.support.registry import CREATED_UNIX, EVERY, best, links, locked, names, publish, record, rewrite
from verl_autoexport.cli.main import main
from verl_autoexport.errors import RegistryBusy, RegistryError
from verl_autoexport.milestones.events import Milestone
from verl_autoexport.registry import journal, pointers, requests, store
from verl_autoexport.registry.record import read_record
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry, write_json_atomic
from verl_autoexport.system.durable_files import is_temp
from verl_autoexport.system.untrusted import read_json

# -- publish, list, find ------------------------------------------------------------------


def test_constructor_and_readers_touch_nothing(root):
    registry = Registry(root)
    assert registry.versions() == registry.invalid() == registry.milestones() == registry.outcomes() == []
    assert registry.pending_requests() == []
    assert not root.exists()


def test_publish_writes_a_whole_version(registry, root):
    version = publish(registry, 2)
    assert (version.number, version.step, version.path) == (1, 2, root / "v0001-step2")
    assert registry.versions() == [version]
    assert version.record.version == 1
    assert read_record(root / "v0001-step2") == version.record == read_record(root / "v0001-step2/export.json")
    assert (root / "v0001-step2/sub/model.safetensors").read_bytes() == b"weights"
    assert not any((root / ".staging").iterdir())
    assert read_json(root / "registry.json") == {
        "schema_version": 1, "next_version": 2, "superseded": {}, "pins": [], "pointers": {"latest": "v0001-step2"},
        "removed": [],
    }  # fmt: skip
    assert not [p for p in root.rglob("*") if is_temp(p.name)]


def test_all_is_durable_before_it_is_visible(registry, root, monkeypatch):
    staged = registry.stage("x")
    (staged.path / "sub").mkdir()
    (staged.path / "sub/model.safetensors").touch()
    happened = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (happened.append("rename"), rename(a, b)))
    registry.publish(staged, record(2))
    at = happened.index("rename")
    before = {name.removeprefix(str(staged.path)).split(".tmp-")[0] for name in happened[:at]}
    assert before == {"/sub/model.safetensors", "/sub", "", "/.export.json"}
    assert happened[at - 1] == str(staged.path)
    assert happened[at + 1] == str(root), "the new name itself"
    assert str(root / ".journal.jsonl") in happened[at:]


def test_relative_root_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registry = Registry.create("exports")
    monkeypatch.chdir("/")
    assert publish(registry, 1).path == tmp_path / "exports/v0001-step1"


def test_numbers_go_on_over_gaps_deletions_and_lost_files(registry, root):
    publish(registry, 2)
    publish(registry, 4)
    shutil.rmtree(root / "v0002-step4")
    assert publish(registry, 6).number == 3
    shutil.rmtree(root / "v0003-step6")
    (root / "registry.json").unlink()
    assert publish(registry, 8).number == 4, "the journal remembers"
    (root / ".journal.jsonl").unlink()
    (root / "registry.json").unlink()
    (root / "v7-step1").mkdir()
    assert publish(registry, 10).number == 8, "whatever looks like a version takes its number"
    shutil.rmtree(root / "v0008-step10")
    rewrite(root / "registry.json", next_version=1)
    assert publish(registry, 10).number == 9, "the journal knows better than an old registry.json"
    rewrite(root / "registry.json", next_version=1)
    registry.recover()
    assert read_json(root / "registry.json")["next_version"] == 10
    rewrite(root / "registry.json", next_version=12345)
    assert publish(registry, 12).name == "v12345-step12"


def test_existing_empty_directory_is_not_overwritten(registry, root):
    (root / "v0001-step2").mkdir(parents=True)
    assert publish(registry, 2).name == "v0002-step2"
    assert not any((root / "v0001-step2").iterdir())


def test_target_that_appears_meanwhile_is_refused(registry, root, monkeypatch):
    # A program that takes no lock makes the very directory after the number was chosen.
    def write(path, data):
        (root / "v0001-step2").mkdir()
        write_json_atomic(path, data)

    monkeypatch.setattr(store, "write_json_atomic", write)
    staged = registry.stage("x")
    with pytest.raises(RegistryError, match=r"v0001-step2: already there"):
        registry.publish(staged, record(2))
    assert staged.path.is_dir()
    registry.discard(staged)
    registry.discard(staged)
    assert not any((root / ".staging").iterdir())
    assert not any((root / "v0001-step2").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "negative"),
        ({"step": "../../evil"}, "step: expected"),
        ({"created_at": "yesterday"}, "ISO 8601"),
        ({"run": {"x": object()}}, "cannot be written as JSON"),
        ({"schema_version": 2}, "schema_version 2, expected 1"),
    ],
)
def test_bad_record_publishes_nothing(registry, root, changes, message):
    with pytest.raises(RegistryError, match=message):
        registry.publish(registry.stage("x"), record(2, **changes))
    assert names(registry) == []
    assert registry.invalid() == []
    assert publish(registry, 2).number == 1


def test_publish_takes_only_its_own_staging(registry, tmp_path):
    other = Registry.create(tmp_path / "other").stage("x")
    with pytest.raises(RegistryError, match="not a staging directory in"):
        registry.publish(other, record(2))
    with pytest.raises(RegistryError, match="not a staging directory in"):
        registry.discard(other)
    staged = registry.stage("x")
    registry.publish(staged, record(2))
    registry.discard(staged)
    assert names(registry) == ["v0001-step2"], "discarding what was published harms nothing"
    with pytest.raises(RegistryError, match="not a staging directory in"):
        registry.publish(staged, record(2))


def test_label_cannot_leave_the_staging_directory(registry, root):
    for label in ("../../up", "..", "", "a/b", "x" * 500):
        assert registry.stage(label).path.parent == root / ".staging"


def test_non_finite_metrics_and_strange_text_survive(registry, root):
    publish(registry, 2, metrics={"a": float("nan"), "b": float("inf"), "c": 1.5}, run={"project": "试\udc80"})
    found = registry.versions()[0].record
    assert found.metrics == {"a": None, "b": None, "c": 1.5}
    assert found.run["project"] == "试\udc80"


def test_invalid_directories_are_ignored_and_explained(registry, root):
    for step in (2, 4, 6, 8, 10, 12, 14, 16):
        publish(registry, step)
    (root / "v0001-step2/export.json").unlink()
    (root / "v0002-step4/export.json").write_text('{"half')
    rewrite(root / "v0003-step6/export.json", step=7)
    rewrite(root / "v0004-step8/export.json", version=True)
    rewrite(root / "v0005-step10/export.json", triggers=["x"])
    (root / "v0006-step12").rename(root / "v6-step12")
    with (root / "v0007-step14/export.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    (root / "v0009-step9").symlink_to("v0009-step9")
    (root / "v0010-step9").symlink_to("v0008-step16")
    (root / "v0011-step9").touch()
    (root / "v0012-step9").mkdir()
    os.mkfifo(root / "v0012-step9/export.json")
    (root / "v0013-step9").mkdir()
    (root / "v0013-step9/export.json").symlink_to("export.json")
    (root / "v0014-step9").mkdir()
    (root / "v0014-step9/export.json").write_text("[" * 200_000)
    (root / "v0008-step16-backup").mkdir()
    assert names(registry) == ["v0008-step16"]
    why = {path.name: reason for path, reason in registry.invalid()}
    expected = {
        "v0001-step2": "missing", "v0002-step4": "not JSON", "v0003-step6": "step 6 as in the name, found version 3, s",
        "v0004-step8": "version: expected", "v0005-step10": "triggers: expected", "v6-step12": "be v0006-step12",
        "v0007-step14": "67108865 bytes", "v0009-step9": "a link", "v0010-step9": "a link",
        "v0011-step9": "not a directory", "v0012-step9": "not a regular file", "v0013-step9": "cannot be read",
        "v0014-step9": "not JSON: nested",
    }  # fmt: skip
    assert why.keys() == expected.keys()
    for name, text in expected.items():
        assert text in why[name]
        assert str(root / name) in why[name], "messages name the path"
    with pytest.raises(RegistryError, match=r"v0001-step2 is no valid version: .*missing"):
        registry.find("v0001-step2")


def test_find(registry, root):
    publish(registry, 2, best(0.9))
    publish(registry, 4, EVERY, best(3.0, "min", "loss", "loss"))
    publish(registry, 4)
    for spec, name in {
        "v0001-step2": "v0001-step2", "v1": "v0001-step2", "1": "v0001-step2", "v0002": "v0002-step4",
        "step4": "v0003-step4", "latest": "v0003-step4", "best": "v0001-step2", "best-loss": "v0002-step4",
    }.items():  # fmt: skip
        assert registry.find(spec).name == name
    for spec in ("v9", "v0001-step3", "best-none", "step3", "", "../x", "9" * 5000):
        with pytest.raises(RegistryError, match=r"no version .*there is v0001-step2, v0002-step4.*best, best-loss"):
            registry.find(spec)
    shutil.copytree(root / "v0001-step2", root / "v0001-step8")
    rewrite(root / "v0001-step8/export.json", step=8)
    with pytest.raises(RegistryError, match="several versions: v0001-step2, v0001-step8"):
        registry.find("v1")
    with pytest.raises(RegistryError, match="nowhere: no such directory"):
        Registry(root / "nowhere").find("latest")


@pytest.mark.parametrize("where", ["file/exports", "file", "/proc/exports"])
def test_create_refuses_what_cannot_be_written(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match=rf"{tmp_path / where}: cannot be the output directory"):
        Registry.create(tmp_path / where)


def test_create_refuses_a_directory_that_became_read_only():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        Registry.create(folder)
        for path in (folder, *map(str, Path(folder).iterdir())):
            os.chmod(path, 0o777)
        os.chmod(folder, 0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # for root everything is writable
        try:
            with pytest.raises(RegistryError, match=rf"{folder}: cannot be the output directory, it is not writable"):
                Registry.create(folder)
        finally:
            os.seteuid(user)


def test_writers_do_not_make_a_mistyped_root(root):
    registry = Registry(root)
    for act in (registry.request, registry.recover, registry.refresh_pointers, lambda: registry.stage("x")):
        with pytest.raises(RegistryError, match="exports: no such directory"):
            act()
    assert not root.exists()


# -- pointers -----------------------------------------------------------------------------


def test_latest_is_the_greatest_step_then_number(registry, root):
    publish(registry, 4)
    publish(registry, 2)
    assert links(root) == {"latest": "v0001-step4"}
    publish(registry, 4)
    assert links(root) == {"latest": "v0003-step4"} == registry.pointers()


def test_best_by_mode_and_earliest_of_equals(registry, root):
    publish(registry, 6, best(0.7), best(1.0, "min", "loss", "loss"))
    publish(registry, 4, best(0.9), best(0.5, "min", "loss", "loss"))
    publish(registry, 2, best(0.9), best(0.5, "min", "loss", "loss"))
    publish(registry, 2, best(0.9), best(0.6, "min", "loss", "loss"))
    assert links(root) == {"best": "v0003-step2", "best-loss": "v0003-step2", "latest": "v0001-step6"}


def test_best_ignores_values_of_another_metric_or_mode(registry, root):
    publish(registry, 2, best(99.0, metric="val/old"))
    publish(registry, 4, best(98.0, mode="min"))
    publish(registry, 6, best(0.5))
    publish(registry, 8, best(0.4))
    assert links(root)["best"] == "v0003-step6"


def test_hostile_triggers_make_no_pointer(registry, root):
    publish(registry, 2, best(1.0, name="a/../../b"), best(1.0, mode="up"), best(1.0, name="x" * 200))
    assert links(root) == {"latest": "v0001-step2"}
    rewrite(root / "v0001-step2/export.json", triggers=[{"policy": "best", "value": "9", "mode": "max"}])
    assert registry.refresh_pointers() == []
    assert links(root) == {"latest": "v0001-step2"}


def test_pointers_follow_deleted_versions(registry, root):
    publish(registry, 2)
    publish(registry, 4, best(0.9))
    shutil.rmtree(root / "v0002-step4")
    (root / "best-mine").symlink_to("/elsewhere")
    assert registry.refresh_pointers() == []
    assert links(root) == {"best-mine": "/elsewhere", "latest": "v0001-step2"}, "foreign links stay"
    assert read_json(root / "registry.json")["pointers"] == {"latest": "v0001-step2"}


def test_something_else_called_latest_stays_and_is_reported(registry, root):
    root.joinpath("latest").mkdir()
    root.joinpath("best").write_text("mine")
    publish(registry, 2, best(0.9))
    warnings = registry.refresh_pointers()
    assert [w.split(":")[0] for w in warnings] == [str(root / "latest"), str(root / "best")]
    assert root.joinpath("best").read_text() == "mine"
    assert registry.recover() == warnings
    assert registry.find("latest").name == registry.find("best").name == "v0001-step2"


def test_link_loops_and_dangling_links_are_replaced(registry, root):
    root.joinpath("latest").symlink_to("latest")
    root.joinpath("best").symlink_to("v0099-step1")
    publish(registry, 2, best(0.9))
    assert links(root) == {"best": "v0001-step2", "latest": "v0001-step2"}


def test_without_links_registry_json_holds_the_pointers(registry, root, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    publish(registry, 2, best(0.9))
    assert links(root) == {}
    assert read_json(root / "registry.json")["pointers"] == {"latest": "v0001-step2", "best": "v0001-step2"}
    assert "only registry.json has it" in registry.refresh_pointers()[0]
    assert registry.find("best").number == 1


# -- rollback and memory ------------------------------------------------------------------


def test_rollback_supersedes_and_numbering_goes_on(registry, root):
    publish(registry, 2, best(0.5))
    publish(registry, 4, best(0.9))
    publish(registry, 6)
    assert [v.name for v in registry.supersede_after(2)] == ["v0002-step4", "v0003-step6"]
    assert [v.superseded for v in registry.versions()] == [False, True, True]
    assert links(root) == {"best": "v0001-step2", "latest": "v0001-step2"}
    assert registry.supersede_after(2) == []
    again = publish(registry, 4, best(0.6))
    assert again.name == "v0004-step4"
    assert links(root) == {"best": "v0004-step4", "latest": "v0004-step4"}
    assert registry.find("step4") == again
    assert [(m.step, m.triggers[0].value) for m in registry.milestones()] == [(2, 0.5), (4, 0.6)]
    assert registry.supersede_after(0)[-1].superseded
    assert links(root) == {}
    assert read_json(root / "registry.json")["superseded"]["v0002-step4"]["resumed_at"] == 2


def test_plain_resume_writes_nothing(registry, root):
    publish(registry, 4)
    before = (root / ".journal.jsonl").read_bytes(), (root / "registry.json").stat().st_mtime_ns
    assert registry.supersede_after(4) == []
    assert before == ((root / ".journal.jsonl").read_bytes(), (root / "registry.json").stat().st_mtime_ns)


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff\xfe", b"[" * 99999])
def test_registry_json_is_rebuilt(registry, root, damage):
    publish(registry, 2)
    publish(registry, 4)
    registry.pin("v1")
    registry.pin("v2")
    registry.unpin("v2")
    registry.supersede_after(2)
    good = read_json(root / "registry.json")
    path = root / "registry.json"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert [(v.superseded, v.pinned) for v in registry.versions()] == [(False, True), (True, False)], "readers cope"
    (line,) = registry.recover()
    assert str(path) in line
    assert "rebuilt from the versions and the journal" in line
    assert read_json(path) == good
    assert registry.recover() == []


@pytest.mark.parametrize("key", ["pointers", "pins", "superseded"])
def test_names_in_registry_json_cannot_lead_outside(registry, root, key):
    publish(registry, 2)
    evil = {"pointers": {"latest": "../../etc"}, "pins": ["../x"], "superseded": {"../x": {"resumed_at": 1}}}
    rewrite(root / "registry.json", **{key: evil[key]})
    assert "rebuilt" in registry.recover()[0]
    assert links(root) == {"latest": "v0001-step2"}


def test_registry_json_of_a_newer_program_is_left_alone(registry, root):
    publish(registry, 2)
    rewrite(root / "registry.json", schema_version=2)
    before = (root / "registry.json").read_bytes()
    for act in (registry.versions, registry.recover, lambda: publish(registry, 4)):
        with pytest.raises(RegistryError, match=r"registry\.json: schema_version 2 is newer"):
            act()
    assert (root / "registry.json").read_bytes() == before


def test_milestones_are_the_memory_of_the_triggers(registry, root):
    triggers = [EVERY.to_dict()]
    registry.journal("asked", step=2, time=100.0, triggers=triggers)
    registry.journal("started", step=2)
    publish(registry, 2, EVERY, best(0.5))
    for step, fate in {3: "failed", 5: "dropped", 7: "started"}.items():
        registry.journal("asked", step=step, time=100.0 + step, triggers=triggers)
        registry.journal(fate, step=step, reason="because")
    publish(registry, 9)
    publish(registry, 11)
    shutil.rmtree(root / "v0003-step11")
    told = registry.milestones()
    assert told[0] == Milestone(2, 100.0, (EVERY, best(0.5)), "published"), "the version's reasons, the asking's time"
    assert told[1:4] == [
        Milestone(3, 103.0, (EVERY,), "failed"), Milestone(5, 105.0, (EVERY,), "dropped"),
        Milestone(7, 107.0, (EVERY,), "pending"),
    ]  # fmt: skip
    assert [(m.step, m.status) for m in told[4:]] == [(9, "published"), (11, "published")], "also what was pruned"
    assert [m.step for m in registry.milestones(up_to_step=5)] == [2, 3, 5]
    assert [(o["step"], o["event"], o["reason"], o["triggers"]) for o in registry.outcomes()] == [
        (3, "failed", "because", triggers), (5, "dropped", "because", triggers),
    ]  # fmt: skip
    publish(registry, 3)
    assert [o["step"] for o in registry.outcomes()] == [5]


def test_milestone_without_journal_takes_the_records_time(registry, root):
    publish(registry, 2)
    publish(registry, 4, created_at="2025-01-02T03:04:05Z")
    (root / ".journal.jsonl").unlink()
    assert [m.time for m in registry.milestones()] == [CREATED_UNIX, CREATED_UNIX]


def test_rollback_cancels_what_was_asked_after(registry):
    registry.journal("asked", step=2, triggers=[])
    registry.journal("asked", step=4, triggers=[])
    registry.journal("asked", step=6, triggers=[])
    registry.journal("failed", step=6, reason="x")
    assert registry.supersede_after(2) == []
    assert [(m.step, m.status) for m in registry.milestones()] == [(2, "pending")]
    assert registry.outcomes() == []
    registry.journal("asked", step=4, triggers=[])
    registry.journal("dropped", step=4, reason="y")
    assert [(m.step, m.status) for m in registry.milestones()] == [(2, "pending"), (4, "dropped")]


def test_lost_journal_lines_are_made_good(registry, root):
    registry.journal("failed", step=2, reason="x")
    publish(registry, 2)
    publish(registry, 4)
    registry.supersede_after(2)
    path = root / ".journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])  # neither the publication of step 2 nor the rollback
    assert [(m.step, m.status) for m in registry.milestones()] == [(2, "published")]
    assert registry.outcomes() == []
    path.write_bytes(b"".join((lines[0], *lines[2:])))
    rewrite(root / "registry.json", superseded={})
    assert registry.recover() == [
        f"{root}/v0002-step4: marked superseded, as the journal says",
        f"{root}/v0001-step2: its publication was missing in the journal, and has been added",
    ]
    before = (root / "registry.json").stat().st_ino
    assert registry.recover() == []
    assert (root / "registry.json").stat().st_ino == before, "nothing to do, nothing written"


def test_failure_after_the_version_appeared_is_no_failure(registry, root, monkeypatch, caplog):
    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", full)
        version = publish(registry, 2)
    assert registry.versions() == [version]
    assert "v0001-step2 is published, but not all is noted" in caplog.text
    assert links(root) == {}
    registry.recover()
    assert links(root) == {"latest": "v0001-step2"}


def test_pins(registry, root):
    publish(registry, 2)
    assert registry.pin("latest").pinned
    assert registry.pin(registry.versions()[0]).pinned
    assert read_json(root / "registry.json")["pins"] == ["v0001-step2"]
    assert not registry.unpin("v1").pinned
    assert not registry.versions()[0].pinned
    with pytest.raises(RegistryError, match="no version 'v9'"):
        registry.pin("v9")


# -- journal and requests -----------------------------------------------------------------


def test_damaged_journal_lines_are_skipped_and_named(registry, root):
    for step in range(1, 6):
        registry.journal("asked", step=step, note="试\n")
    path = root / ".journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"step":2', b'"step":7')  # a flipped bit
    lines[3] = b"\x00\xff garbage"
    lines[4] = lines[4][:20]  # cut short by a crash, no newline
    path.write_bytes(b"\n".join(lines[:5]))
    registry.journal("asked", step=6)
    entries, problems = registry.journal_entries()
    assert [e["step"] for e in entries] == [1, 3, 6]
    assert entries[0]["note"] == "试\n"
    assert abs(entries[2]["time"] - time.time()) < 60
    assert [p.split(": ")[0] for p in problems] == [f"{path}:{line}" for line in (2, 4, 5)]
    with pytest.raises(RegistryError, match="crc32"):
        registry.journal("asked", crc32=1)


def test_requests(registry, root):
    first = registry.request("please")
    second = registry.request()
    (root / ".requests/.x.json.tmp-00000000").touch()
    assert registry.pending_requests() == [first, second]
    assert read_json(first)["note"] == "please"
    registry.clear_requests([first])
    registry.clear_requests([first])
    assert registry.pending_requests() == [second]
    with pytest.raises(RegistryError, match="not a request of this registry"):
        registry.clear_requests([root / ".journal.jsonl"])


def test_looking_for_requests_is_cheap(registry):
    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(100):
            registry.pending_requests()
        return (time.perf_counter() - start) / 100

    assert min(seconds() for _ in range(5)) < 50e-6


def test_write_json_atomic_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(RegistryError, match=r"x\.json: cannot be written as JSON"):
        write_json_atomic(path, {"a": {1, 2}})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]
    old = tmp_path / "old.json"
    os.link(path, old)
    write_json_atomic(path, {"a": 2})
    assert (read_json(path), read_json(old)) == ({"a": 2}, {"a": 1}), "replaced, not written into"


# -- threads ------------------------------------------------------------------------------


def test_one_thread_may_stage_and_another_publish(registry, root):
    with ThreadPoolExecutor(1) as pool:
        staged = pool.submit(registry.stage, "x").result()
        assert Registry(root).recover() == []
        assert registry.publish(staged, record(2)).number == 1
        open_files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        assert not [name for name in open_files if ".staging" in name], "the lock was not let go"


@pytest.mark.parametrize("default", [True, False])
def test_lock_held_too_long_is_an_error(registry, root, monkeypatch, default):
    """The default is asked for when a registry is built."""
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1 if default else 60)
    with ThreadPoolExecutor(1) as pool, locked(root):
        waits = pool.submit(Registry(root, None if default else 0.1).journal, "x")
        wait([waits], timeout=10)
        error = waits.exception() if waits.done() else None
    assert isinstance(error, RegistryBusy), "it waits for longer than it was given"
    assert f"{root / '.lock'}: held by another process for more than 0.1 s" in str(error)


def test_pure_parts():
    assert pointers.choose([]) == {}
    assert journal.replay([{"event": "failed", "step": True}, {"event": "superseded"}, {"event": "asked"}]) == {}


# -- damage -----------------------------------------------------------------------------------

DAMAGE = [
    {"files": [None]}, {"files": [{"name": 5}]}, {"files": [{"name": "a", "bytes": "1"}]}, {"files": [{"sha256": []}]},
    {"files": [{"name": "a", "bytes": 10**30}]}, {"triggers": [None]}, {"triggers": [{"policy": "best", "name": []}]},
    {"triggers": [{"policy": "best", "metric": {}}]}, {"triggers": [{"policy": 1}]}, {"source": {"fingerprint": {}}},
    {"verification": {"load": None}}, {"verification": {"load": {"status": []}}}, {"metrics": {"a": "x"}},
    {"verification": {"contract": {"status": "passed", "transposed": 3}}}, {"metrics": {"a": 10**400}},
    {"metrics": {"a": float("nan")}}, {"timings_s": {"a": None}}, {"timings_s": {"a": float("inf")}}, {"notes": [1]},
    {"architectures": [None]}, {"versions": {"torch": 2}}, {"base_model": []}, {"measured_on": 1}, {"run": None},
    {"created_at": "yesterday"}, {"num_parameters": "1"},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: json.dumps(damage)[:60])
def test_a_damaged_record_stops_nothing_and_is_never_removed(registry, root, damage, capsys):
    for step in (2, 4, 6):
        publish(registry, step, best(0.5))
    rewrite(root / "v0001-step2/export.json", **damage)
    registry = Registry(root)
    assert [(p.name, next(iter(damage)) in why) for p, why in registry.invalid()] == [("v0001-step2", True)]
    assert registry.recover() == [f"{root / 'best'}: now points to v0002-step4"]
    assert publish(registry, 8).number == 4
    for command in (
        ["ls"], ["ls", "--json"], ["show", "2"], ["pin", "2"], ["unpin", "2"], ["request"],
        ["prune", "--last", "1", "--best", "1", "--max-bytes", "1GB"],
    ):  # fmt: skip
        assert main([command[0], str(root), *command[1:]]) == 0, capsys.readouterr().err
    assert main(["show", str(root), "v0001-step2"]) == 1
    assert "no valid version" in capsys.readouterr().err
    registry.prune(Keep(max_bytes=1))
    assert (root / "v0001-step2/export.json").exists()
    assert [m.step for m in registry.milestones()] == [2, 4, 6, 8], "the journal remembers"


def test_wrong_inner_types_in_the_journal_stop_nothing(registry, root, capsys):
    publish(registry, 2, best(0.5))
    for event, fields in (
        ("published", {"step": 3, "version": ["x"]}), ("removed", {"step": 3, "version": {}}), ("report", {}),
        ("asked", {"step": 4, "time": 10**400, "triggers": [{"policy": [], "name": {}, "value": "x"}, None]}),
        ("asked", {"step": 5, "time": "x", "triggers": "y"}), ("failed", {"step": [], "reason": {}}),
        ("failed", {"step": 6, "reason": {}, "version": []}), ("delete_failed", {"path": [], "reason": 1}),
        ("superseded", {"resumed_at": "x", "versions": [1]}), ("superseded", {"resumed_at": 9, "versions": [[], 3]}),
        ("pinned", {"version": 3}), ("keep", {"last": [], "best": {}}),
        ("deleted", {"version": f"v{'9' * 5000}-step1"}),
        ("removed", {"step": 7, "version": "v0007-step7", "created": 10**400, "triggers": [{"name": []}]}),
    ):  # fmt: skip
        registry.journal(event, **fields)
    registry = Registry(root)
    assert registry.recover() == [f"{root / 'v0007-step7'}: removed"]
    assert publish(registry, 8).number == 8
    assert {2, 3, 4, 5, 6, 7, 8} == {m.step for m in registry.milestones()}
    for command in ("ls", "request"):
        assert main([command, str(root)]) == 0, capsys.readouterr().err
    assert registry.prune(Keep(last=1))[1] == []
    assert registry.supersede_after(1) != []


@pytest.mark.parametrize(
    "damage",
    [
        {"next_version": 10**30}, {"pins": [None]}, {"pins": {}}, {"superseded": {"v0001-step2": None}},
        {"superseded": {"v0001-step2": {"resumed_at": 1.5}}}, {"pointers": {"latest": []}}, {"removed": [["x"]]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_inner_types_in_registry_json_rebuild_it(registry, root, damage):
    publish(registry, 2)
    rewrite(root / "registry.json", **damage)
    assert names(Registry(root)) == ["v0001-step2"]
    assert "rebuilt" in Registry(root).recover()[0]
    assert publish(registry, 4).number == 2


def test_requests_are_taken_in_one_go(registry, root):
    assert requests.take(root / ".requests") is None
    asked = registry.request()
    taken = requests.take(root / ".requests")
    assert [p.name for p in registry.pending_requests()] == [asked.name], "taken, not lost"
    later = registry.request()
    assert len(registry.pending_requests()) == 2
    finished = requests.finish(taken)
    assert registry.pending_requests() == [later]
    registry.recover()
    assert not finished.exists()

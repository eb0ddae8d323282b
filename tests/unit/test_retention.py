"""Which versions stay and how the others go: against a plain reference, and a same that removes nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.registry import EVERY, best, links, names, publish, record, rewrite
from tests.support.retention import fill, memory, removals
from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import compaction, journal, pointers, retention, state, versions
from verl_autoexport.registry import journal_reader as notes
from verl_autoexport.registry.retention import Keep, nbytes, plan_retention, show_size
from verl_autoexport.registry.state import Facts
from verl_autoexport.registry.store import Registry
from verl_autoexport.registry.versions import Version, version_name
from verl_autoexport.system.untrusted import read_json

SETTINGS = settings(max_examples=400, deadline=None)


def version(number: int, step: int, *triggers, nbytes: int = 1, superseded=False, pinned=False, **metrics) -> Version:
    files = ({"name": "model.safetensors", "bytes": nbytes},)
    made = record(step, *triggers, metrics=metrics, files=files, version=number)
    return Version(number, step, Path("/r", version_name(number, step)), made, superseded, pinned)


def steps(versions, keep: Keep, **options) -> list[int]:
    return [v.version.step for v in plan_retention(versions, keep, **options).verdicts if v.keep]


# -- the policy, against a reference --------------------------------------------------------

few = st.integers(0, 3)
triggers = st.builds(
    lambda name, metric, mode, value: best(value, mode, metric, name),
    st.sampled_from(["best", "loss"]), st.sampled_from("ab"), st.sampled_from(["max", "min"]), few,
)  # fmt: skip


@st.composite
def lists(draw: Callable) -> list[Version]:
    made = []
    for number in range(1, draw(st.integers(0, 9)) + 1):
        metrics = draw(st.dictionaries(st.sampled_from("ab"), st.one_of(st.none(), few)))
        reasons = draw(st.lists(triggers, max_size=2, unique_by=lambda t: t.name)) or [EVERY]
        flags = {key: draw(st.sampled_from([False, False, False, True])) for key in ("superseded", "pinned")}
        made.append(version(number, draw(st.integers(0, 12)), *reasons, nbytes=draw(few), **flags, **metrics))
    return made


keeps = st.builds(
    Keep,
    *[st.one_of(st.none(), st.integers(1, n)) for n in (3, 3, 6)],
    max_bytes=st.one_of(st.none(), st.integers(1, 12)),
)


def reference(versions: list[Version], keep: Keep) -> set[int]:
    """The numbers that stay: what stays, judged again, until nothing more goes."""
    left = reference_once(versions, keep)
    return left if len(left) == len(versions) else reference([v for v in versions if v.number in left], keep)


def reference_once(versions: list[Version], keep: Keep) -> set[int]:
    """By counting for each version alone how many are before it."""
    if keep == Keep():
        return {v.number for v in versions}
    live = [v for v in versions if not v.superseded]
    newer = {v.number: sum((w.step, w.number) > (v.step, v.number) for w in live) for v in live}
    worth: dict[int, int] = {}
    if keep.last is None and keep.every_n_steps is None and keep.best is None:
        worth = {v.number: 0 if v.superseded else 1 for v in versions}
    for v in live:
        if keep.last is not None and newer[v.number] < keep.last:
            worth[v.number] = 1
    for v in live:
        n = keep.every_n_steps
        rivals = [w for w in live if n and newer[w.number] > newer[v.number] and w.step >= v.step - v.step % n]
        if n is not None and v.step >= n and not rivals:
            worth[v.number] = 2
    never = {v.number for v in versions if v.pinned}
    if live:
        never.add(min(live, key=lambda v: newer[v.number]).number)
    for name in ("best", "loss"):
        claims = [(v, t) for v in live for t in v.record.triggers if t.get("name") == name]
        if not claims:
            continue
        key = {k: claims[-1][1][k] for k in ("metric", "mode")}

        def better(x: float, v: Version, y: float, w: Version, mode: str = key["mode"]) -> bool:
            if x != y:
                return x > y if mode == "max" else x < y
            return newer[v.number] > newer[w.number]

        same = [(v, t) for v, t in claims if t.items() >= key.items()]
        top = [v for v, t in same if not any(better(u["value"], w, t["value"], v) for w, u in same)]
        never.add(top[0].number)
        # If all that may go would go, another metric would decide: then the one that decides now stays.
        rest = [(v, t) for v, t in claims if (v, t) not in same or v is top[0]]
        if rest[-1][1].items() >= key.items():
            pass
        else:
            never.add(claims[-1][0].number)
        value = {v.number: t["value"] for v, t in same}
        value = {v.number: value.get(v.number, v.record.metrics.get(key["metric"])) for v in live}
        for v in live:
            x = value[v.number]
            ahead = [
                w for w in live if value[w.number] is not None and x is not None and better(value[w.number], w, x, v)
            ]
            if keep.best is not None and x is not None and len(ahead) < keep.best:
                worth[v.number] = 3
    by_number = {v.number: v for v in versions}
    stay = never | worth.keys()
    loose = sorted(stay - never, key=lambda n: (worth[n], by_number[n].step, n))
    for gone in range(len(loose) + 1):
        left = stay - set(loose[:gone])
        if keep.max_bytes is None or sum(nbytes(by_number[n]) for n in left) <= keep.max_bytes:
            return left
    return never


@SETTINGS
@given(lists(), keeps)
def test_judgement_is_that_of_the_reference(versions, keep):
    judged = plan_retention(versions, keep)
    assert {v.version.number for v in judged.verdicts if v.keep} == reference(versions, keep)
    assert [v.version for v in judged.verdicts] == versions
    assert sorted(v.version.number for v in judged.removed) == [v.version.number for v in judged.verdicts if not v.keep]
    assert all(v.reason for v in judged.verdicts)
    total = sum(v.nbytes for v in judged.verdicts if v.keep)
    assert any("cannot be met" in w for w in judged.warnings) == (keep.max_bytes is not None and total > keep.max_bytes)


@SETTINGS
@given(lists(), keeps, st.randoms(use_true_random=False))
def test_what_holds_for_every_judgement(versions, keep, random):
    judged = plan_retention(versions, keep)
    kept = [v.version for v in judged.verdicts if v.keep]
    assert pointers.choose(kept) == pointers.choose(versions), "no pointer moves because of a removal"
    assert {v.name for v in versions if v.pinned} <= {v.name for v in kept}
    assert {*pointers.choose(versions).values()} <= {v.name for v in kept}
    assert plan_retention(kept, keep).removed == (), "judged again, nothing more goes"
    assert plan_retention(random.sample(versions, len(versions)), keep) == judged, "in any order of the list"
    left = list(versions)
    for _ in judged.removed:  # one at a time comes to the same
        left.remove(plan_retention(left, keep).removed[0].version)
    assert left == kept
    if keep.max_bytes is None:
        for key, value in keep.to_dict().items():
            if value is not None:
                alone = {v.version.name for v in plan_retention(versions, Keep(**{key: value})).verdicts if v.keep}
                assert alone <= {v.name for v in kept}, "what one key keeps stays, whatever the others say"


def test_examples():
    versions = [version(n, 10 * n, acc=n % 4) for n in range(1, 10)]
    assert steps(versions, Keep()) == [10 * n for n in range(1, 10)]
    assert steps(versions, Keep(last=2)) == [80, 90]
    assert steps(versions, Keep(last=99)) == [10 * n for n in range(1, 10)]
    assert steps(versions, Keep(every_n_steps=25)) == [30, 50, 80, 90], "as the trigger: at 25, 50, 75; 90 is latest"
    assert steps(versions, Keep(max_bytes=3)) == [70, 80, 90]
    assert steps(versions, Keep(last=2, every_n_steps=40)) == [40, 80, 90]
    assert steps(versions, Keep(last=1), links={"served": "v0003-step30"}) == [30, 90]
    claimed = [*versions[:4], version(5, 50, best(3, metric="acc"), acc=3), *versions[5:]]
    assert steps(claimed, Keep(best=3)) == [30, 50, 70, 90], "all that measured it count, of equals the earliest"
    warnings = plan_retention(versions, Keep(best=3)).warnings
    assert warnings == ("best=3 keeps nothing: no version was chosen by a `best` trigger",)
    rolled = [*versions, version(10, 95, superseded=True), version(11, 95, superseded=True, pinned=True)]
    assert [v.version.number for v in plan_retention(rolled, Keep(last=2)).verdicts if v.keep] == [8, 9, 11]
    assert [v.version.number for v in plan_retention(rolled, Keep(max_bytes=3)).verdicts if v.keep] == [8, 9, 11]


def test_what_max_bytes_takes_first():
    versions = [version(n, 10 * n, acc=-n) for n in range(1, 7)]
    versions[0] = version(1, 10, best(-1, metric="acc"), acc=-1)
    keep = {"last": 3, "every_n_steps": 30, "best": 3}  # 60 latest, 10 best; 40 50 by last, 30 milestone, 20 by best
    order = [steps(versions, Keep(max_bytes=n, **keep)) for n in (6, 5, 4, 3, 2, 1)]
    assert order == [
        [10, 20, 30, 40, 50, 60], [10, 20, 30, 50, 60], [10, 20, 30, 60], [10, 30, 60], [10, 60], [10, 60],
    ]  # fmt: skip


def test_policy_refuses_nonsense():
    for value in (0, -1, 2.5, True, "3"):
        with pytest.raises(ValueError, match="last: expected a whole number from 1 on"):
            Keep(last=value)
    assert not Keep()
    assert str(Keep(last=1, max_bytes=5)) == "last=1, max_bytes=5"


def test_hostile_records():
    evil = record(
        3, metrics={"a": 10**400, "b": "x"}, version=1, files=(7, {"bytes": "x"}, {"bytes": -5}, {"bytes": True})
    )
    triggers = tuple(
        {"policy": "best", "name": name, "metric": metric, "value": value, "mode": "max"}
        for name, metric, value in (("best", ["a"], 1), ("x", {"a": 1}, 2), ("y", "a", 10**400), ("../z", "a", 1))
    )
    evil = Version(
        1, 3, Path("/r/v0001-step3"), record(3, version=1, files=evil.files, metrics=evil.metrics), False, False
    )
    object.__setattr__(evil.record, "triggers", triggers)
    assert nbytes(evil) == 0
    assert steps([evil, version(2, 4, a=1)], Keep(best=1)) == [3, 4]


def test_sizes_for_people():
    shown = {999: "999 B", 1500: "1.5 KB", 2_000_000: "2 MB", 123_456_789_000: "123.5 GB", 5 * 10**13: "50 TB"}
    assert {n: show_size(n) for n in shown} == shown


# -- on disk: what a run remembers -----------------------------------------------------------

actions = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 6), st.lists(triggers, max_size=1)),
    st.tuples(st.sampled_from(["asked", "failed", "rollback", "pin"]), st.integers(1, 6)),
    st.tuples(st.just("prune"), keeps),
    st.tuples(st.sampled_from(["recover", "lose registry.json"])),
)


def act(registry: Registry, action: str, *values) -> None:
    if action == "publish":
        publish(registry, values[0], *values[1], metrics={"a": values[0]}, files=({"bytes": values[0]},))
    elif action in ("asked", "failed"):
        registry.journal(action, step=values[0], time=1.0, triggers=[EVERY.to_dict()])
    elif action == "rollback":
        registry.supersede_after(values[0])
    elif action == "pin":
        with suppress(RegistryError):
            registry.pin(f"step{values[0]}")
    elif action == "prune":
        assert registry.prune(values[0])[1] == []
    elif action == "recover":
        registry.recover()
    else:
        (registry.root / "registry.json").unlink(missing_ok=True)


def returns(script: list[tuple[Any, ...]]) -> bool:
    """Whether a `best…` goes back to a metric that it had before another one: what that had chosen may be gone."""
    seen: dict[str, list[tuple[Any, Any]]] = {}
    for action in (a for a in script if a[0] == "publish"):
        for trigger in action[2]:
            measures, measure = seen.setdefault(trigger.name, []), (trigger.metric, trigger.mode)
            if measure in measures[:-1]:
                return True
            if measure not in measures:
                measures.append(measure)
    return False


@settings(max_examples=40, deadline=None)
@given(st.lists(actions, min_size=3, max_size=14))
def test_a_run_remembers_as_if_nothing_were_ever_removed(script):
    assume(not returns(script))
    fsync, rolled_back = os.fsync, False
    os.fsync = lambda fd: None  # only power loses what a killed process has written
    try:
        with tempfile.TemporaryDirectory() as folder:
            pruned, same = (Registry.create(Path(folder, name)) for name in ("pruned", "same"))
            for action in script:
                act(pruned, *action)
                if action[0] == "pin" and memory(pruned)["exported"]:
                    with suppress(RegistryError):  # the same version, though a newer one of its step may be gone
                        same.pin(pruned.find(f"step{action[1]}"))
                elif action[0] not in ("prune", "pin"):
                    act(same, *action)
                rolled_back = rolled_back or action[0] == "rollback"
                left = [v for v in same.versions() if v.name in names(pruned)]
                # After a rollback the best or latest of the past that is left may be one that went before.
                expected = {"pointers": pointers.choose(left)} if rolled_back else {}
                assert memory(pruned) == memory(same) | expected
                assert links(pruned.root) == pruned.pointers()
                assert links(same.root) == same.pointers()
                assert {*names(pruned)} <= {*names(same)} == {p.name for p in same.root.glob("v*")}
                assert {*names(pruned)} == {p.name for p in pruned.root.glob("v*")}
            assert publish(pruned, 7).name == publish(same, 7).name, "no number is used twice"
            assert not any(pruned.root.glob(".trash/*"))
    finally:
        os.fsync = fsync


def test_prune_removes_and_says_why(registry, root):
    fill(registry)
    before, number = memory(registry), read_json(root / "registry.json")["next_version"]
    judged, failed = registry.prune(Keep(last=2))
    assert (names(registry), failed) == (["v0001-step1", "v0002-step2", "v0004-step4", "v0005-step5"], [])
    assert [v.version.name for v in judged.removed] == ["v0006-step6", "v0003-step3"], "superseded ones go first"
    assert removals(registry) == [
        ("removed", "v0006-step6"), ("removed", "v0003-step3"), ("deleted", "v0006-step6"), ("deleted", "v0003-step3"),
    ]  # fmt: skip
    (gone,) = [e for e in registry.journal_entries()[0] if e["event"] == "removed" and e["step"] == 3]
    assert (gone["reason"], gone["bytes"], gone["superseded"]) == ("kept by none of last=2", 7, False)
    assert memory(registry) == before
    assert registry.invalid() == []
    assert not any((root / ".trash").iterdir())
    after = snapshot(root)
    assert registry.prune(Keep(last=2))[0].removed == ()
    assert registry.recover() == []
    assert snapshot(root) == after, "nothing to do, nothing written"
    (root / "registry.json").unlink()
    assert publish(registry, 7).number == number, "although the highest version is gone, and registry.json"


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {
        p.name: (s.st_ino, s.st_mtime_ns) for p in (root, *root.glob("**/*")) if (s := p.lstat()) and p.name != ".lock"
    }


def test_nothing_is_removed_without_a_rule(registry, root):
    fill(registry)
    assert registry.prune(Keep())[0].removed == ()
    assert len(names(registry)) == 6


def test_more_than_are_removed_at_once(registry, root):
    for step in range(1, 21):
        publish(registry, step)
    assert len(registry.prune(Keep(last=1))[0].removed) == 19
    assert names(registry) == ["v0020-step20"]


def test_what_is_being_written_stays(registry):
    publish(registry, 1)
    staged = registry.stage("x")
    (staged.path / "model.safetensors").write_bytes(b"x" * 100)
    publish(registry, 2)
    registry.prune(Keep(last=1, max_bytes=1))
    assert registry.publish(staged, record(3)).step == 3


def test_links_of_others_hold_a_version(registry, root, tmp_path):
    for step in range(1, 6):
        publish(registry, step)
    (root / "served").symlink_to("v0001-step1")
    (root / "absolute").symlink_to(root / "v0002-step2/")
    (root / "elsewhere").symlink_to(tmp_path / "other/v0003-step3")
    reasons = {v.version.step: v.reason for v in registry.prune(Keep(last=1))[0].verdicts}
    assert [v.step for v in registry.versions()] == [1, 2, 5]
    assert (reasons[1], reasons[2]) == ("served links to it", "absolute links to it")


def test_whatever_a_link_leads_to_in_the_end_stays(registry, root, tmp_path):
    for step in range(1, 10):
        publish(registry, step)
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "deep/er").mkdir(parents=True)
    (root / "serving").mkdir()
    for name, target in {
        "by-alias": tmp_path / "alias/v0001-step1",
        "dots": tmp_path / "deep/er/../../exports/v0002-step2/.",
        "a-file": "v0003-step3/sub/model.safetensors",
        "a-folder": root / "v0004-step4/sub",
        "chain": "by-dots",
        "by-dots": "../exports/v0005-step5",
        "serving/now": "../v0006-step6",
        "loop": "loop",
        "nowhere": "v0099-step99",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    for through in (root, tmp_path / "alias"):
        Registry(through).prune(Keep(last=1))
        assert [v.step for v in registry.versions()] == [1, 2, 3, 4, 5, 6, 9]
    (root / "chain").unlink()
    (root / "by-dots").unlink()
    registry.prune(Keep(last=1))
    assert [v.step for v in registry.versions()] == [1, 2, 3, 4, 6, 9], "only while the link stands"


def test_a_link_in_a_version_holds_its_target_as_long_as_it_stays_itself(registry, root):
    for step in range(1, 7):
        publish(registry, step)
    for holder, link, target in (
        ("v0006-step6", "base", "../v0001-step1"),
        ("v0006-step6", "again", "../v0006-step6"),
        ("v0004-step4", "sub/base", "../../v0002-step2/model.safetensors"),
        ("v0004-step4", "itself", "."),
    ):
        (root / holder / link).parent.mkdir(exist_ok=True)
        (root / holder / link).symlink_to(target)
    judged = registry.plan_retention(Keep(last=2)).verdicts
    assert [v.version.step for v in judged if v.keep] == [1, 5, 6]
    assert judged[0].reason == "v0006-step6/base links to it"
    registry.prune(Keep(last=2))
    assert [v.step for v in registry.versions()] == [1, 5, 6], "what only a removed version leads to goes with it"


def test_a_link_made_while_it_is_judged_is_respected(registry, root, monkeypatch):
    for step in range(1, 6):
        publish(registry, step)
    judged = []

    def slow(*args):
        judged.append(plan_retention(*args))
        if len(judged) == 1:
            (root / "served").symlink_to("v0001-step1")
            registry.pin("step2")
        return judged[-1]

    monkeypatch.setattr(retention, "plan_retention", slow)
    registry.prune(Keep(last=1))
    assert [v.step for v in registry.versions()] == [1, 2, 5]


def test_what_lies_in_the_trash_and_the_journal_does_not_know_is_left_and_told(registry, root):
    fill(registry)
    (root / "v0003-step3").rename(root / ".trash/v0003-step3-0123abcd")
    (root / ".trash/v0004-step4-0123abcd").mkdir()  # without a record
    for name in (".journal.jsonl", "registry.json"):
        (root / name).unlink()
    told = registry.recover()
    assert any("v0003-step3-0123abcd: left alone: the journal does not know" in line for line in told)
    assert os.listdir(root / ".trash") == ["v0003-step3-0123abcd"]
    assert "left alone" in registry.prune(Keep(last=1))[1][0]
    (root / ".trash/v0003-step3-0123abcd").rename(root / "v0003-step3")
    assert registry.find("step3").number == 3
    assert registry.recover() != []
    assert registry.prune(Keep(last=1))[1] == []
    assert not any((root / ".trash").iterdir())


# -- long lives -----------------------------------------------------------------------------


def test_records_and_journal_are_read_once_however_much_is_removed(registry, root, monkeypatch):
    for step in range(1, 81):
        publish(registry, step)
    registry, reads = Registry(root), Counter()

    def counted(module, name: str) -> None:
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (reads.update([name]), call(*args))[1])

    counted(versions, "read_record_file")
    counted(journal, "parse")
    before = len(registry.journal_entries()[0])
    judged = registry.prune(Keep(last=1))[0]
    assert len(judged.removed) == 79
    assert reads["read_record_file"] == 80
    assert len(registry.journal_entries()[0]) == before + 2 * 79
    assert reads["parse"] == before + 2 * 79


def test_a_shortened_journal_says_the_same(registry, root, monkeypatch):
    fill(registry)
    for _ in range(8):
        for step in range(1, 30):
            registry.note([("asked", {"step": step, "triggers": []}), ("failed", {"step": step, "reason": "x"})])
            registry.note([("report", {"line": "r"}), ("delete_failed", {"path": "p", "reason": "y"})])
        registry.pin("step2")
        registry.unpin("step2")
        registry.note_policy(Keep(last=step))
        registry.supersede_after(20)
    with (root / ".journal.jsonl").open("ab") as file:
        file.write(b"damaged\n")
    before = memory(registry), Facts(registry.journal_entries()[0]), registry.noted_policy()
    monkeypatch.setattr(notes, "WORTH", 10)
    monkeypatch.setattr(compaction, "WORTH", 10)
    registry = Registry(root)
    lines = len(registry.journal_entries()[0])
    registry.prune(Keep())
    entries, problems = registry.journal_entries()
    assert len(entries) < lines / 2
    assert len(problems) == 1, "damaged lines stay and are told"
    for reader in (registry, Registry(root)):
        facts = Facts(reader.journal_entries()[0])
        assert memory(reader) == before[0]
        assert vars(facts) == vars(before[1])
        assert reader.noted_policy() == before[2]
    shortened = os.stat(root / ".journal.jsonl")
    registry.prune(Keep())
    assert os.path.samestat(os.stat(root / ".journal.jsonl"), shortened), "once is enough"


def test_what_is_added_while_the_journal_is_shortened_stays(registry, root, monkeypatch):
    for _ in range(40):
        registry.journal("failed", step=2, reason="x")
    monkeypatch.setattr(notes, "WORTH", 10)
    monkeypatch.setattr(compaction, "WORTH", 10)
    keep, calls = compaction.keep, []

    def late(entries):
        calls.append(len(entries))
        if len(calls) == 2:  # the file has been read, and the lock is not yet taken
            Registry(root).journal("failed", step=3, reason="late")
        return keep(entries)

    monkeypatch.setattr(compaction, "keep", late)
    registry = Registry(root)
    registry.prune(Keep())
    assert len(calls) == 2
    assert len(registry.journal_entries()[0]) < 40
    assert [o["step"] for o in registry.outcomes()] == [2, 3]


def test_a_link_that_cannot_be_moved_holds_its_version(registry, root, monkeypatch):
    publish(registry, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
        publish(registry, 2)
        registry.prune(Keep(last=1))
        assert (root / links(root)["latest"] / "export.json").is_file()
    registry.prune(Keep(last=1))
    assert names(registry) == ["v0002-step2"]


def test_removed_versions_do_not_come_back(registry, root, tmp_path):
    fill(registry)
    backup = shutil.copytree(root / "v0003-step3", tmp_path / "backup")
    registry.prune(Keep(last=2))
    (root / "registry.json").unlink()
    assert "v0003-step3" not in names(registry)
    shutil.copytree(backup, root / "v0003-step3")
    registry.recover()
    assert "v0003-step3" in names(registry), "but for those that a person brings back"


def test_registry_json_from_before_removals_were_noted_is_read(registry, root):
    fill(registry)
    data = read_json(root / "registry.json")
    del data["removed"]
    (root / "registry.json").write_text(json.dumps(data))
    assert state.load(root)[1] is None
    rewrite(root / "registry.json", removed=["../../etc"])
    assert "removed: expected a list of version directories" in state.load(root)[1]


def test_the_policy_of_a_run_is_on_record(registry):
    assert registry.noted_policy() is None
    registry.note_policy(Keep())
    assert registry.noted_policy() is None, "nothing to say"
    for keep in (Keep(last=3), Keep(last=3), Keep(best=1, max_bytes=5), Keep()):
        registry.note_policy(keep)
        assert registry.noted_policy() == keep
    assert [e["event"] for e in registry.journal_entries()[0]] == ["keep"] * 3
    registry.journal("keep", last="many")
    assert registry.noted_policy() == Keep(), "a line that makes no sense is passed over"

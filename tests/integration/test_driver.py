"""The driver over several starts of a run, with a real Ray, actor and checkpoints; only the trainer is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from tests.support.driven_run import BEST, METRIC, Script
from tests.support.odd_metrics import ODD, Odd, Shifty
from tests.support.registry import publish
from verl_autoexport.errors import AutoExportError, ConfigError
from verl_autoexport.export.pipeline import export_to_registry
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.milestones.events import Trigger
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry
from verl_autoexport.service import controller as driver_module
from verl_autoexport.service.request import ExportRequest
from verl_autoexport.sources import holds
from verl_autoexport.sources.holds import MAX_ATTEMPTS, find_holds
from verl_autoexport.sources.live.snapshot import SnapshotHandle


@pytest.fixture
def run(cluster, source, tmp_path):
    return Script(source, tmp_path)


def test_what_an_unreachable_output_directory_held_up_is_decided_with_its_own_metrics(run):
    run.start(best=BEST, on_train_end=False)
    exports, away = run.root / "exports", run.root / "away"
    exports.rename(away)
    exports.touch()
    for step, value in ((1, 0.9), (2, 0.2)):
        with pytest.raises(AutoExportError):
            run.save(step)
        with pytest.raises(AutoExportError):
            run.driver.logged(step, {METRIC: value})
    exports.unlink()
    away.rename(exports)
    run.step(3, 0.3)
    run.finish()
    assert run.live() == {1: {"best"}}
    assert run.registry.find("best").record.metrics == {METRIC: 0.9}


def test_a_step_saved_anew_supersedes_before_its_validation(run):
    run.start(best=BEST, on_train_end=False)
    for step, value in ((1, 0.5), (2, 0.9)):
        run.step(step, value)
    run.finish(False)
    run.start(1, best=BEST, on_train_end=False)
    run.save(2)  # and dies while it validates step 2
    run.start(2, best=BEST, on_train_end=False)
    run.driver.logged(2, {METRIC: 0.6})
    run.finish(False)
    assert run.registry.find("best").record.metrics[METRIC] == 0.6
    assert len([v for v in run.registry.versions() if v.step == 2]) == 2


def test_a_start_at_a_wrong_step_that_never_trains_takes_nothing(run):
    run.start(at_steps=[4], on_train_end=False)
    run.step(4)
    ray.kill(run.driver.service.receiver)
    run.start(0, at_steps=[4], on_train_end=False)
    run.finish(False)
    run.start(4, at_steps=[4], on_train_end=False)
    run.finish(False)
    assert run.live() == {4: {"at_steps"}}
    assert find_holds(run.root) == []


@pytest.mark.parametrize("logs_again", [True, False])
def test_a_run_that_died_validating_its_last_step_exports_it_at_the_next_start(run, logs_again):
    run.start(0, 4)
    run.save(4)
    run.start(4, 4)
    if logs_again:
        run.driver.logged(4, {METRIC: 0.5})
    run.finish()
    assert run.live() == {4: {"on_train_end"}}
    assert find_holds(run.root) == []


@pytest.mark.parametrize("logs_again", [True, False])
def test_a_checkpoint_that_verl_saved_just_before_the_run_was_killed_is_judged_at_the_next_start(run, logs_again):
    run.start(at_steps=[2], best=BEST, on_train_end=False)
    run.step(1, 0.5)
    run.saved(2)  # and is killed before anyone is told
    run.start(2, at_steps=[2], best=BEST, on_train_end=False)
    if logs_again:
        run.driver.logged(2, {METRIC: 0.9})
    else:
        run.step(3, 0.4)
    run.finish(False)
    assert run.live() == {1: {"best"}, 2: {"at_steps", "best"} if logs_again else {"at_steps"}}
    assert find_holds(run.root) == []


def test_a_step_that_was_judged_is_not_judged_again_at_the_next_start(run):
    run.start(at_steps=[2], on_train_end=False)
    run.step(2)
    run.driver.ledger.wait(60)
    run.start(2, at_steps=[2], on_train_end=False)
    assert run.driver.holds == {}
    run.step(3)
    run.finish(False)
    assert [v.step for v in run.registry.versions()] == [2]


def test_a_run_that_ended_leaves_nothing_to_be_judged(run):
    run.start(at_steps=[9], on_train_end=False)
    run.step(1)
    run.finish()
    run.start(1, 1)
    assert run.driver.holds == {}
    run.finish()
    assert run.live() == {}


def test_a_glob_that_may_mean_a_validation_metric_waits_for_the_validation(run):
    run.start(best={"metric": "*/acc/mean@1"}, on_train_end=False)
    run.driver.logged(1, {"training/loss": 1.0})
    run.driver.logged(2, {METRIC: 0.5})
    run.start(best={"metric": "*/accuracy"}, on_train_end=False)
    with pytest.raises(ConfigError, match="no logged metric"):
        run.driver.logged(2, {METRIC: 0.5})


def test_a_hand_export_of_the_same_step_does_not_swallow_best(run):
    run.start(best=BEST, on_train_end=False)
    run.save(1)
    spec = checkpoint_spec(run.root / "global_step_1", verify=False)
    export_to_registry(spec, run.registry, LocalRunner(1))
    run.driver.logged(1, {METRIC: 0.5})
    run.finish()
    assert run.registry.find("best").record.triggers[0]["policy"] == "best"


def test_a_few_milestones_wait_for_an_actor_that_is_not_up_yet(run):
    run.start(on_save=True, on_train_end=False)
    for step in (1, 2, 3):
        run.step(step)
    run.finish()
    assert sorted(run.live()) == [1, 2, 3]


def test_a_request_is_kept_where_requests_are_off_and_used_where_they_are_on(run):
    run.start(on_save=True, on_request=False, on_train_end=False)
    run.registry.request()
    run.step(1)
    run.finish(False)
    assert len(run.registry.pending_requests()) == 1
    run.start(1, on_train_end=False)
    run.step(2)
    run.finish(False)
    assert run.live()[2] == {"on_request"}
    assert run.registry.pending_requests() == []


def test_what_retention_removed_is_neither_exported_again_nor_forgotten_by_the_triggers(run):
    options = {"best": BEST, "at_steps": [1, 3, 4], "on_train_end": False, "keep": {"last": 1}}
    run.start(**options)
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.1)):
        run.step(step, value)
    run.finish(False)
    assert sorted(run.live()) == [2, 3], "1 is gone; 2 is best, 3 is latest"
    assert run.registry.noted_policy() == Keep(last=1)
    first = run.registry.exported()[0]
    (run.root / "exports/registry.json").unlink()
    run.start(3, **options)
    assert [m.step for m in run.driver.judge.history] == [1, 2, 3]
    triggers = tuple(map(Trigger.from_dict, first.triggers))
    request = ExportRequest(1, 1.0, triggers, run.root / "none", first.fingerprint, hold=run.root / "none")
    again = run.driver.service.submit(request).result(60)
    assert (again.status, again.version) == ("published", "v0001-step1"), "as Ray asks again after a crash"
    run.step(4, 0.6)
    run.finish(False)
    assert run.live() == {2: {"best"}, 4: {"at_steps"}}
    assert [v.name for v in run.registry.versions()] == ["v0002-step2", "v0004-step4"]


def test_a_hold_whose_export_fails_is_tried_again_a_few_times_and_then_named(cluster, source, tmp_path, caplog):
    """The run directory is copied to another disk meanwhile, and the checkpoint itself is gone."""
    run = Script(source, tmp_path / "run")
    run.start(at_steps=[2], on_train_end=False)
    run.save(2)
    config = next((run.root / ".autoexport").glob("step_2-*/huggingface/config.json"))
    config.unlink()
    shutil.rmtree(run.root / "global_step_2")
    run.driver.logged(2, {})
    assert "1 failed (step 2: PlanError" in run.finish(False)
    other = tmp_path / "other"
    subprocess.run(["cp", "-a", run.root, other], check=True)
    shutil.rmtree(run.root)
    moved = Script(run.source, other)
    moved.driver = run.driver
    (hold,) = find_holds(other)
    for attempts in range(1, MAX_ATTEMPTS):
        (hold,) = find_holds(other)
        assert hold.request["attempts"] == attempts
        moved.start(2, at_steps=[2], on_train_end=False)
        assert "1 failed (step 2: PlanError" in moved.finish(False)
    moved.start(2, at_steps=[2], on_train_end=False)
    assert "0 published; in " in moved.finish(False)
    assert f"export {hold.path} --registry {other / 'exports'}; to give it up: rm -r {hold.path}" in caplog.text
    assert [p.path for p in find_holds(other)] == [hold.path]


# -- a registry that somebody else has locked -------------------------------------------------

HOLDER = """
import sys
from filelock import FileLock
with FileLock(f"{sys.argv[1]}/.lock"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Another process holds the registry's lock."""
    command = [sys.executable, "-c", HOLDER, str(root)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.communicate("\n")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(driver_module, "_LOCK_S", 0.1)


class Copies:
    """Workers that copy at once, and hand nothing over."""

    room = 9

    def __init__(self) -> None:
        self.captured: list[set[str]] = []

    def capture(self, actor, wait_s, needed):
        self.captured.append(set(needed))
        return SnapshotHandle(f"copy{len(self.captured)}", Path("/nowhere"), ray.put([]), "fsdp", 0.0, [], [])


def test_weights_are_copied_before_anything_waits_for_the_registry(run, impatient):
    publish(Registry.create(run.exports), 9)  # of a past that this run abandons, which takes the lock to say
    driver = run.start(at_steps=[1, 2], on_train_end=False)
    driver.live = Copies()
    with locked(run.exports):
        for step in (1, 2, 3):
            driver.logged(step, {})
        assert driver.live.captured == [set(), {"copy1"}], "and the first copy is kept while the second is made"
        assert [p.decision.step for p in driver.ledger.unsent] == [1, 2]
        assert [m.step for m in run.registry.milestones()] == [9]
    driver.logged(4, {})
    assert driver.ledger.unsent == []
    driver.ledger.wait(60)
    assert [m.step for m in run.registry.milestones()] == [1, 2], "in order, none lost"
    run.finish(False)


def test_what_a_held_lock_kept_from_being_booked_is_booked_later_and_in_order(run, impatient):
    run.start(at_steps=[2, 3, 4, 5], on_train_end=False)
    for step in (2, 3):
        run.step(step)
    run.finish(False)
    run.start(2, at_steps=[2, 3, 4, 5], on_train_end=False)
    with locked(run.exports):
        run.step(3)
        run.step(4)
        assert {p.step for p in find_holds(run.root)} == {3, 4}, "the checkpoints are held"
        assert not any(v.superseded for v in run.registry.versions())
    run.step(5)
    report = run.finish(False)
    assert "3 published" in report, report
    found = [(v.step, v.superseded) for v in run.registry.versions()]
    assert found == [(2, False), (3, True), (3, False), (4, False), (5, False)]
    assert [m.step for m in run.registry.milestones()] == [2, 3, 4, 5]


def test_the_end_waits_for_the_lock_and_says_what_could_not_be_booked(run, impatient):
    run.start(at_steps=[1], on_train_end=False)
    with locked(run.exports):
        run.step(1)
        run.driver.end(True)
        report = run.driver.drain(0.5)
    assert "not finished in time: step 1; the next start of this run finishes them" in report
    assert "not in the journal" in report
    run.start(1, at_steps=[1], on_train_end=False)
    run.finish(False)
    assert run.live() == {1: {"at_steps"}}


# -- odd metrics ------------------------------------------------------------------------------


def test_odd_metrics_cost_no_milestone(run):
    run.start(best=BEST, on_train_end=False)
    run.save(1)
    run.driver.logged(
        1, {METRIC: 0.5, Odd(KeyError): 1.0, "shifty": Shifty()} | {f"odd{i}": odd for i, odd in enumerate(ODD)}
    )
    run.save(2)
    run.driver.logged(2, {METRIC: 10**400})
    run.finish(False)
    assert run.live() == {1: {"best"}}
    assert run.registry.find("best").record.metrics == {METRIC: 0.5}


# -- requests and holds that nobody vouches for -----------------------------------------------


def test_many_requests_are_one_and_a_later_one_is_not_lost(run, monkeypatch):
    run.start(on_train_end=False)
    for number in range(2000):
        (run.exports / f".requests/{number}.json").touch()
    submit = run.driver.ledger.submit

    def late(*args):
        (run.exports / ".requests/late.json").touch()  # asked while the step is judged
        monkeypatch.undo()
        submit(*args)

    monkeypatch.setattr(run.driver.ledger, "submit", late)
    run.step(1)
    assert [p.name for p in run.registry.pending_requests()] == ["late.json"]
    run.step(2)
    run.step(3)
    run.finish(False)
    assert run.live() == {1: {"on_request"}, 2: {"on_request"}}
    assert run.registry.pending_requests() == []


def test_requests_taken_by_a_run_that_was_killed_wait_for_the_next(run):
    run.start(on_train_end=False)
    run.registry.request()
    assert run.driver.requests.look()
    assert len(run.registry.pending_requests()) == 1
    run.start(0, on_train_end=False)
    run.step(1)
    run.finish(False)
    assert run.live() == {1: {"on_request"}}
    assert run.registry.pending_requests() == []


def test_a_hold_with_wrong_inner_types_stops_nothing(run):
    run.start(at_steps=[1, 2], on_train_end=False)
    run.step(1)
    ray.kill(run.driver.service.receiver)
    (hold,) = find_holds(run.root)
    holds.choose(hold, dict(hold.request) | {"time": "x", "triggers": [None]})
    shutil.rmtree(run.root / "global_step_1")
    run.start(1, at_steps=[1, 2], on_train_end=False)
    run.step(2)
    assert "cannot be read: time: not a value that a request can have: 'x'" in run.finish(False)
    assert run.live()[2] == {"at_steps"}
    assert [p.path for p in find_holds(run.root)] == [hold.path], "it may be the last copy"


@pytest.mark.parametrize("odd", [{"attempts": "1"}, {"attempts": None}, {"live": 5}, {"live": {"a": 1}}])
def test_a_hold_of_odd_content_does_not_stop_the_start_of_training(odd, run):
    hold = holds.make_hold(run.saved(1), 1, "actor")
    holds.choose(hold, {"step": 1, **odd})
    run.start(1, at_steps=[2], on_train_end=False)
    run.step(2)
    assert "step 1 failed: its request" in run.finish(False)
    assert run.live()[2] == {"at_steps"}


def test_the_same_bytes_saved_again_after_a_rollback_keep_their_hold(run):
    run.start(at_steps=[6], on_train_end=False, queue={"drain_timeout_s": 0})
    run.save(6)
    ray.kill(run.driver.service.receiver)
    run.driver.logged(6, {})
    run.start(4, at_steps=[6], on_train_end=False)
    run.driver.logged(5, {})
    run.save(6)
    run.driver.logged(6, {})
    shutil.rmtree(run.root / "global_step_6")
    assert "1 published" in run.finish(False)

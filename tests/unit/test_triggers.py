"""Which steps become milestones: single policies, their combination, and whole random runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verl_autoexport.config.reading import load_config
from verl_autoexport.errors import ConfigError
from verl_autoexport.milestones.events import EARLIER_WEIGHTS, THESE_WEIGHTS, Milestone, StepEvent, Trigger
from verl_autoexport.milestones.triggers import (
    AtSteps,
    Best,
    EveryNSteps,
    EverySeconds,
    OnRequest,
    OnSave,
    OnTrainEnd,
    RunStart,
    Threshold,
    build_policies,
    check_metrics,
    decide,
    measured_on,
    resolve_metric,
)

START = RunStart(0, 1000.0)
NAN = math.nan


def event(step: int, time: float | None = None, /, **fields) -> StepEvent:
    metrics = {k: fields.pop(k) for k in list(fields) if k in ("m", "m2")}
    return StepEvent(step, fields.pop("metrics", metrics), START.time + step if time is None else time, **fields)


def fired(step: int, policy: str, status: str = "published", *, time: float = 0.0, **fields) -> Milestone:
    return Milestone(step, time, (Trigger(policy, "", **fields),), status)


def best(step: int, value: float, status: str = "published", **fields) -> Milestone:
    return fired(step, "best", status, **{"name": "best", "metric": "m", "value": value, "mode": "max", **fields})


def reason(policy, e: StepEvent, history=(), start=START) -> str | None:
    trigger = policy.decide(e, history, start)
    return trigger and trigger.reason


# --- one policy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "step", "history", "expected"),
    [
        (2, 1, [], None),
        (2, 2, [], "step 2: every 2 steps"),
        (2, 3, [fired(2, "every_n_steps")], None),
        (2, 4, [fired(2, "every_n_steps")], "step 4: every 2 steps"),
        (5, 6, [], "step 6 is the first checkpoint after step 5 (every 5 steps)"),
        (5, 9, [fired(6, "every_n_steps")], None),
        (5, 10, [fired(6, "every_n_steps")], "step 10: every 5 steps"),
        (5, 27, [fired(6, "every_n_steps")], "step 27 is the first checkpoint after step 25 (every 5 steps)"),
        (4, 6, [fired(4, "every_n_steps", "failed")], "step 6 is the first checkpoint after step 4 (every 4 steps)"),
        (4, 6, [fired(4, "every_n_steps", "dropped")], None),
        (4, 6, [fired(4, "every_n_steps", "pending")], None),
        (4, 6, [fired(4, "on_save")], "step 6 is the first checkpoint after step 4 (every 4 steps)"),
    ],
)
def test_every_n_steps(n, step, history, expected):
    assert reason(EveryNSteps(n), event(step), history) == expected


def test_every_n_steps_does_not_lose_an_interval_over_a_resume():
    assert reason(EveryNSteps(4), event(6), [], RunStart(5, 0.0)) == (
        "step 6 is the first checkpoint after step 4 (every 4 steps)"
    )


@pytest.mark.parametrize(
    ("seconds", "time", "history", "expected"),
    [
        (60, 1059.9, [], None),
        (60, 1060.0, [], "60 s since the start (every 60 s)"),
        (60, 1100.0, [fired(1, "every_seconds", time=1041.0)], None),
        (60, 1110.0, [fired(1, "every_seconds", time=1041.0)], "69 s since the last one (every 60 s)"),
        (60, 1100.0, [fired(1, "every_seconds", "failed", time=1041.0)], "100 s since the start (every 60 s)"),
        (60, 1100.0, [fired(1, "on_save", time=1041.0)], "100 s since the start (every 60 s)"),
        (0.5, 1001.0, [fired(1, "every_seconds", time=900.0)], "101 s since the last one (every 0.5 s)"),
        # the clock was set back after the last one, after the start
        (60, 1100.0, [fired(1, "every_seconds", time=9000.0)], "60 s since the last one (every 60 s)"),
        (60, 1100.0, [fired(t, "every_seconds", time=t) for t in (1090, 9000)], None),
        (60, 500.0, [], "60 s since the start (every 60 s)"),
    ],
)
def test_every_seconds(seconds, time, history, expected):
    assert reason(EverySeconds(seconds), event(3, time), history) == expected


@pytest.mark.parametrize(
    ("policy", "yes", "no", "expected"),
    [
        (AtSteps((3, 7)), event(7), event(6), "step 7 is listed"),
        (OnSave(), event(5), event(5, saved=False), "checkpoint of step 5"),
        (OnTrainEnd(), event(9, last=True), event(9), "training ended at step 9"),
        (OnRequest(), event(4, requested=True), event(4), "requested at step 4"),
    ],
)
def test_policies_of_the_step_alone(policy, yes, no, expected):
    assert reason(policy, yes) == expected
    assert reason(policy, no) is None


@pytest.mark.parametrize(
    ("value", "history", "expected"),
    [
        (0.5, [], "m = 0.5 is the first value"),
        (0.5, [best(2, 0.4)], "m = 0.5 is better than 0.4 of step 2"),
        (0.5, [best(2, 0.4, "pending")], "m = 0.5 is better than 0.4 of step 2"),
        (0.5, [best(2, 0.5)], None),
        (0.5, [best(2, 0.6)], None),
        (0.5, [best(2, 0.3), best(4, 0.6, "failed")], "m = 0.5 is better than 0.3 of step 2"),
        (0.5, [best(2, 0.6), best(4, 0.4)], None),
        (0.5, [best(2, 0.4), best(4, 0.4)], "m = 0.5 is better than 0.4 of step 2"),
        # another policy, name, metric or direction says nothing about this one
        (0.5, [fired(2, "threshold", name="best", metric="m", value=0.9, mode="max")], "m = 0.5 is the first value"),
        (0.5, [best(2, 0.9, name="other")], "m = 0.5 is the first value"),
        (0.5, [best(2, 0.9, metric="m2")], "m = 0.5 is the first value"),
        (0.5, [best(2, 0.9, mode="min")], "m = 0.5 is the first value"),
        (NAN, [], None),
        (math.inf, [], None),
        (-math.inf, [], None),
        (None, [], None),
        ("high", [], None),
        (np.float64(0.5), [best(2, 0.4)], "m = 0.5 is better than 0.4 of step 2"),
        (np.int32(1), [best(2, 0.4)], "m = 1 is better than 0.4 of step 2"),
    ],
)
def test_best(value, history, expected):
    assert reason(Best("best", "m"), event(6, m=value), history) == expected


@pytest.mark.parametrize(
    ("mode", "value", "fires"),
    [("max", 0.5, False), ("max", 0.625, False), ("max", 0.75, True), ("min", 0.375, False), ("min", 0.25, True)],
)
def test_best_must_win_by_more_than_min_delta(mode, value, fires):
    trigger = Best("best", "m", mode, 0.125).decide(event(6, m=value), [best(2, 0.5, mode=mode)], START)
    if not fires:
        assert trigger is None
    else:
        why = f"m = {value} is better than 0.5 of step 2 by more than 0.125"
        assert trigger == Trigger("best", why, "best", "m", value, mode)


def test_best_without_its_metric_in_the_step():
    assert reason(Best("best", "m"), event(6, m2=1.0)) is None


@pytest.mark.parametrize(
    ("mode", "value", "once", "history", "fires"),
    [
        ("above", 0.9, True, [], True),
        ("above", 0.8, True, [], False),
        ("above", NAN, True, [], False),
        ("above", math.inf, True, [], False),
        ("below", 0.7, True, [], True),
        ("below", 0.8, True, [], False),
        ("above", 0.9, True, [fired(2, "threshold", name="t")], False),
        ("above", 0.9, True, [fired(2, "threshold", "pending", name="t")], False),
        ("above", 0.9, True, [fired(2, "threshold", "failed", name="t")], True),
        ("above", 0.9, True, [fired(2, "threshold", name="u")], True),
        ("above", 0.9, False, [fired(2, "threshold", name="t")], True),
    ],
)
def test_threshold(mode, value, once, history, fires):
    trigger = Threshold("t", "m", 0.8, mode, once).decide(event(6, m=value), history, START)
    assert trigger == (Trigger("threshold", f"m = {value} is {mode} 0.8", "t", "m", value, mode) if fires else None)


# --- metric names -----------------------------------------------------------------------------

NAMES = ["val-core/gsm8k/acc/mean@1", "val-core/math/acc/mean@1", "val-aux/gsm8k/len", "critic/score/mean", "odd[1]"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("critic/score/mean", "critic/score/mean"),
        ("val-core/gsm8k/*", "val-core/gsm8k/acc/mean@1"),
        ("*/len", "val-aux/gsm8k/len"),
        ("odd[1]", "odd[1]"),
        ("CRITIC/*", None),
        ("critic", None),
    ],
)
def test_resolve_metric(pattern, expected):
    assert resolve_metric(pattern, NAMES) == expected
    assert resolve_metric(pattern, dict.fromkeys(NAMES, 0.0)) == expected


def test_a_pattern_of_several_metrics_is_refused():
    both = "val-core/gsm8k/acc/mean@1, val-core/math/acc/mean@1"
    with pytest.raises(ConfigError, match=re.escape(f"metric 'val-core/*' matches several: {both}. Name one of them.")):
        resolve_metric("val-core/*", NAMES)
    with pytest.raises(ConfigError, match=r"^metric '\*' matches several: m00, .*, m07 and 12 more\. Name one"):
        resolve_metric("*", [f"m{i:02}" for i in range(20)])


def test_a_pattern_that_means_several_metrics_later_in_the_run_does_not_fire():
    assert Best("best", "val-core/*").decide(event(1, metrics=dict.fromkeys(NAMES, 0.5)), [], START) is None


def trigger_config(**keys):
    return load_config({"output_dir": "x", "trigger": keys}).trigger


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        (
            "best",
            "val-core/gsm8k/acc/mean@4",
            "autoexport.trigger.best.metric: no logged metric is or matches 'val-core/gsm8k/acc/mean@4'. "
            "Near names: val-core/gsm8k/acc/mean@1, val-core/math/acc/mean@1",
        ),
        (
            "threshold",
            "score",
            "trigger.threshold.metric: no logged metric is or matches 'score'. Near names: critic/s",
        ),
        (
            "best",
            "val-core/*/best@1",
            "no logged metric is or matches 'val-core/*/best@1'. Near names: val-core/gsm8k/",
        ),
        ("best", "zzz", f"matches 'zzz'. Logged are: {', '.join(sorted(NAMES))}."),
        (
            "best",
            "val-core/*",
            "autoexport.trigger.best.metric: metric 'val-core/*' matches several: val-core/gsm8k/acc",
        ),
    ],
)
def test_check_metrics_names_the_near_ones(kind, pattern, message):
    entry = {"metric": pattern, **({"above": 1} if kind == "threshold" else {})}
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_metrics(trigger_config(**{kind: entry}), NAMES)


def test_check_metrics_accepts_what_resolves():
    check_metrics(
        trigger_config(best={"metric": "*/len"}, threshold={"metric": "critic/score/mean", "below": 0}), NAMES
    )
    check_metrics(trigger_config(), [])


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ([], None),
        ([None], None),
        (["val-core/a", None], THESE_WEIGHTS),
        (["critic/score"], EARLIER_WEIGHTS),
        (["val-core/a", "critic/score"], EARLIER_WEIGHTS),
    ],
)
def test_measured_on(metrics, expected):
    assert measured_on([Trigger("best", "", metric=m) for m in metrics]) == expected


# --- all policies together --------------------------------------------------------------------


def test_build_policies():
    config = trigger_config(
        every_n_steps=2,
        at_steps=[5, 3],
        every_seconds=9,
        on_save=True,
        best=[{"metric": "a"}, {"metric": "b", "name": "low", "mode": "min", "min_delta": 0.5}],
        threshold=[{"metric": "a", "above": 0}, {"metric": "b", "below": 0.25, "once": False}],
    )
    assert build_policies(config) == [
        EveryNSteps(2),
        AtSteps((3, 5)),
        EverySeconds(9.0),
        OnSave(),
        OnTrainEnd(),
        OnRequest(),
        Best("best", "a", "max", 0.0),
        Best("low", "b", "min", 0.5),
        Threshold("a>0", "a", 0.0, "above", True),
        Threshold("b<0.25", "b", 0.25, "below", False),
    ]
    assert build_policies(trigger_config(on_train_end=False, on_request=False)) == []


ALL = [EveryNSteps(2), AtSteps((4,)), OnSave(), OnTrainEnd(), OnRequest(), Best("best", "m"), Threshold("t", "m", 0)]


def names(decision) -> list[str]:
    return [t.policy for t in decision.triggers] if decision else []


def test_one_decision_a_step_with_all_its_reasons():
    e = event(4, m=1.0, requested=True, last=True)
    decision = decide(ALL, e, [], START)
    assert names(decision) == [
        "every_n_steps", "at_steps", "on_save", "on_train_end", "on_request", "best", "threshold",
    ]  # fmt: skip
    assert (decision.step, decision.time) == (4, e.time)


@pytest.mark.parametrize(
    ("e", "history", "expected"),
    [
        (event(0, m=9.0, requested=True, last=True), [], []),  # untrained weights
        (event(8, saved=False), [fired(4, "every_n_steps", "published")], ["every_n_steps"]),  # no on_save
        (event(4, m=9.0), [fired(4, "on_save", "published")], []),
        (event(4, m=9.0), [fired(4, "on_save", "pending")], []),
        (event(4), [fired(4, "every_n_steps", "failed")], ["every_n_steps", "at_steps", "on_save"]),
        (event(4), [fired(4, "every_n_steps", "dropped")], ["at_steps", "on_save"]),
        (event(5, m=NAN), [], ["every_n_steps", "on_save"]),
    ],
)
def test_steps_that_are_none(e, history, expected):
    assert names(decide(ALL, e, history, START)) == expected


@pytest.mark.parametrize(
    ("policies", "step", "history", "expected"),
    [
        ([OnSave()], 5, [fired(3, "on_save")], []),
        ([OnSave()], 6, [fired(3, "on_save")], ["on_save"]),
        ([OnSave()], 2, [], ["on_save"]),
        ([OnSave()], 5, [fired(3, "on_save", "pending")], []),
        ([OnSave()], 5, [fired(3, "on_save", "failed")], ["on_save"]),
        ([OnSave()], 5, [fired(3, "on_save", "dropped")], ["on_save"]),
        ([OnSave()], 5, [fired(1, "on_save"), fired(4, "at_steps"), fired(2, "on_save")], []),
        ([EveryNSteps(1), EverySeconds(1.0), OnSave()], 5, [fired(3, "at_steps")], []),
        ([OnSave(), AtSteps((5,))], 5, [fired(3, "on_save")], ["on_save", "at_steps"]),
        ([Best("best", "m")], 5, [fired(3, "on_save")], ["best"]),
    ],
)
def test_min_steps_between_holds_back_droppable_triggers_only(policies, step, history, expected):
    assert names(decide(policies, event(step, m=1.0), history, START, min_steps_between=3)) == expected


def test_a_held_back_interval_is_not_lost():
    policies, history = [EveryNSteps(4)], [fired(3, "at_steps")]
    assert decide(policies, event(4), history, START, 3) is None
    assert names(decide(policies, event(6), history, START, 3)) == ["every_n_steps"]


# --- random runs against a plain reference ----------------------------------------------------


@dataclass
class Saved:
    """What happens at one checkpoint of a random run."""

    gap: int
    value: float | None
    outcome: str
    settle: int  # exports that finish before this step is decided
    resume: int | None  # the process dies after this step and resumes from that many checkpoints before


VALUES = st.one_of(st.none(), st.just(NAN), st.integers(-3, 3).map(lambda i: i / 4), st.floats(allow_infinity=False))
SAVED = st.builds(
    Saved,
    gap=st.integers(1, 5),
    value=VALUES,
    outcome=st.sampled_from(["published", "published", "failed"]),
    settle=st.integers(0, 3),
    resume=st.sampled_from([None, None, None, 0, 1, 3]),
)


@dataclass
class Row:
    """The reference's memory of a milestone; deliberately not the package's own classes."""

    step: int
    every: bool
    best: bool
    value: float | None
    outcome: str
    settled: bool = False

    @property
    def status(self) -> str:
        return self.outcome if self.settled else "pending"


def reference(rows: list[Row], step: int, value: float | None, n: int, mode: str, delta: float) -> tuple[bool, bool]:
    """The two decisions, in the words of the contract."""
    alive = [r for r in rows if r.status != "failed"]
    if any(r.step == step for r in alive):
        return False, False
    last = max([0, *(r.step for r in alive if r.every)])
    every = any(k % n == 0 for k in range(last + 1, step + 1))
    if value is None or value != value:
        return every, False
    kept = [r.value for r in alive if r.best]
    return every, all(value - k > delta if mode == "max" else k - value > delta for k in kept)


def rebuilt(history: list[Milestone]) -> list[Milestone]:
    """Through JSON, as a restart reads it."""
    data = json.loads(json.dumps([[m.step, m.time, [t.to_dict() for t in m.triggers], m.status] for m in history]))
    return [Milestone(s, t, tuple(Trigger.from_dict(x) for x in ts), status) for s, t, ts, status in data]


@settings(max_examples=300, deadline=None)
@given(
    run=st.lists(SAVED, max_size=25),
    n=st.integers(1, 7),
    mode=st.sampled_from(["max", "min"]),
    delta=st.sampled_from([0.0, 0.25]),
)
@example(run=[Saved(2, v, "published", 9, None) for v in (0.5, 0.5, NAN, 0.25, 0.75, 0.75)], n=3, mode="max", delta=0.0)
@example(run=[Saved(2, 0.5, "failed", 0, None), Saved(2, 0.25, "published", 1, 1)], n=2, mode="max", delta=0.0)
def test_random_runs_equal_the_reference(run, n, mode, delta):
    policies = [EveryNSteps(n), Best("best", "m", mode, delta)]
    start, step, steps = RunStart(0, 0.0), 0, [0]
    rows: list[Row] = []
    history: list[Milestone] = []
    for saved in run:
        step += saved.gap
        steps.append(step)
        for row in [r for r in rows if not r.settled][: saved.settle]:
            row.settled = True
        history = [Milestone(m.step, m.time, m.triggers, r.status) for m, r in zip(history, rows, strict=True)]

        expected = reference(rows, step, saved.value, n, mode, delta)
        metrics = {} if saved.value is None else {"m": saved.value, "other": 1.0}
        decision = decide(policies, StepEvent(step, metrics, float(step)), history, start)
        assert ("every_n_steps" in names(decision), "best" in names(decision)) == expected

        if decision:
            history.append(Milestone(step, float(step), decision.triggers))
            rows.append(Row(step, *expected, saved.value, saved.outcome))
        if saved.resume is not None:  # the caller cuts the history at the resumed step
            step = steps[max(0, len(steps) - 1 - saved.resume)]
            steps = [s for s in steps if s <= step]
            rows = [r for r in rows if r.step <= step]
            history = rebuilt([m for m in history if m.step <= step])
            start = RunStart(step, float(step))


@settings(max_examples=100, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=20), mode=st.sampled_from(["max", "min"]))
def test_the_last_best_is_the_earliest_of_the_best_values(values, mode):
    history: list[Milestone] = []
    for step, value in enumerate(values, 1):
        if d := decide([Best("best", "m", mode)], event(step, m=value), history, START):
            history.append(Milestone(step, d.time, d.triggers, "published"))
    real = [v for v in values if v is not None and v == v]
    if real:
        winner = (max if mode == "max" else min)(real)
        assert history[-1].step == values.index(winner) + 1
    else:
        assert history == []

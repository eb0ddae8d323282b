"""The judge of a run: scripts of events, and the decisions that come out. No Ray, no files, no clock."""

from __future__ import annotations

from typing import Any

import pytest

from verl_autoexport.config.reading import load_config
from verl_autoexport.milestones.events import Decision, Milestone, StepEvent, Trigger
from verl_autoexport.milestones.judge import Judge
from verl_autoexport.milestones.triggers import RunStart

METRIC = "val-core/x/acc/mean@1"


def judge(start: int = 0, last_step: int | None = None, past: tuple[Milestone, ...] = (), **trigger: Any) -> Judge:
    made = Judge(load_config({"output_dir": "/nowhere", "trigger": {"on_train_end": False} | trigger}).trigger)
    made.begin(RunStart(start, 0.0), last_step, past)
    return made


def run(made: Judge, *steps: int, ended: bool = False, value: float | None = None) -> list[int]:
    """Log these steps one after the other; returns the steps of the decisions."""
    found = []
    for step in steps:
        made.log(StepEvent(step, {} if value is None else {METRIC: value}, float(step)))
        found += decide(made)
    return found + (decide(made, True) if ended else [])


def decide(made: Judge, ended: bool = False) -> list[int]:
    found = []
    for event in made.due(ended):
        if (decision := made.decide(event)) is not None:
            made.remember(decision, "pending")
            found.append(decision.step)
        made.decided(event.step)
    return found


def test_steps_are_decided_in_order_and_once():
    made = judge(at_steps=[1, 2, 3])
    for step in (3, 1, 2):
        made.log(StepEvent(step, {}, 0.0))
    assert decide(made) == [1, 2, 3]
    assert run(made, 2) == [], "a milestone stands"
    assert made.due() == []


def test_the_first_event_of_a_step_counts():
    made = judge(best={"metric": METRIC})
    made.log(StepEvent(1, {METRIC: 0.5}, 0.0))
    made.log(StepEvent(1, {METRIC: 0.9}, 0.0))
    assert [event.metrics for event in made.due()] == [{METRIC: 0.5}]


def test_the_last_step_waits_for_the_end():
    made = judge(last_step=3, every_n_steps=1, on_train_end=True)
    assert run(made, 1, 2, 3) == [1, 2]
    made.end(True, 3)
    (event,) = made.due(ended=True)
    decision = made.decide(event)
    assert {trigger.policy for trigger in decision.triggers} == {"every_n_steps", "on_train_end"}


def test_it_waits_no_longer_once_a_later_step_is_logged():
    made = judge(last_step=2, every_n_steps=1)
    assert run(made, 1, 2, 3) == [1, 2]
    assert decide(made, ended=True) == [3]


@pytest.mark.parametrize(("succeeded", "logged"), [(False, 3), (True, 4)])
def test_no_end_of_training_is_announced_where_it_failed_or_went_on(succeeded, logged):
    made = judge(last_step=3, on_train_end=True)
    assert run(made, 1, 2, 3) == []
    made.end(succeeded, logged)
    assert decide(made, ended=True) == []


def test_a_resumed_last_step_is_the_end_of_training_though_nothing_is_trained():
    made = judge(start=3, last_step=3, on_train_end=True)
    made.log(StepEvent(3, {}, 0.0))
    made.end(True, 3)
    assert decide(made, ended=True) == [3]


def test_the_past_counts_and_failures_give_their_turn_back():
    best = Trigger("best", "", "best", METRIC, 0.8, "max")
    made = judge(start=2, past=(Milestone(1, 0.0, (best,), "published"),), best={"metric": METRIC})
    assert run(made, 3, value=0.7) == []
    assert run(made, 4, value=0.9) == [4]
    made.remember(Decision(4, 0.0, (Trigger("best", "", "best", METRIC, 0.9, "max"),)), "failed")
    assert run(made, 5, value=0.85) == [5], "the value of a failed milestone is no longer the best"


def test_spacing_holds_back_and_is_left_out_where_it_is_said():
    made = judge(every_n_steps=1, min_steps_between=5)
    assert run(made, 1, 2) == [1]
    event = StepEvent(3, {}, 0.0)
    assert made.decide(event) is None
    assert made.decide(event, spaced=False).step == 3

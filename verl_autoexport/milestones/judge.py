"""The judge of a run turns events of its steps into decisions. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from verl_autoexport.config.schema import TriggerConfig
from verl_autoexport.milestones.events import Decision, Milestone, StepEvent
from verl_autoexport.milestones.triggers import History, RunStart, build_policies, decide


class Judge:
    """Decides each logged step once, in the order of steps.

    The event of the run's last step waits until training has ended or a later step is logged,
    since `on_train_end` may become one more trigger of the same version.
    """

    def __init__(self, trigger: TriggerConfig) -> None:
        self.policies = build_policies(trigger)
        self.min_steps_between = trigger.min_steps_between
        self.history = History()
        self.start, self.last_step = RunStart(0, 0.0), None
        self.waiting: dict[int, StepEvent] = {}
        """By step: logged, but not decided yet."""

    def begin(self, start: RunStart, last_step: int | None, milestones: Iterable[Milestone]) -> None:
        """Training continues from `start`; `milestones` are those of the run's past."""
        self.start, self.last_step, self.history = start, last_step, History(milestones)

    def log(self, event: StepEvent) -> None:
        """A step is logged; only its first event counts."""
        self.waiting.setdefault(event.step, event)

    def end(self, succeeded: bool, logged_step: int) -> None:
        """Training has ended after it logged `logged_step`, whose waiting event may be the last one."""
        step = max(self.waiting, default=0)
        # This process trained the step, or a killed one did that could not decide its last step.
        finished = step == logged_step and (logged_step > self.start.step or step == self.last_step)
        if self.last_step is not None and step >= self.last_step and succeeded and finished:
            self.waiting[step] = replace(self.waiting[step], last=True)

    def due(self, ended: bool = False) -> list[StepEvent]:
        """The events that can be decided now, by step."""
        events = [self.waiting[step] for step in sorted(self.waiting)]
        if events and not ended and self.last_step is not None and events[-1].step >= self.last_step:
            events.pop()
        return events

    def decide(self, event: StepEvent, spaced: bool = True) -> Decision | None:
        """The decision on one event; `spaced` False ignores `min_steps_between`."""
        return decide(self.policies, event, self.history, self.start, self.min_steps_between if spaced else 0)

    def decided(self, step: int) -> None:
        """The event of this step no longer waits."""
        self.waiting.pop(step, None)

    def remember(self, decision: Decision, status: str) -> None:
        """The judge remembers the status of a decision for later ones."""
        self.history.remember(Milestone(decision.step, decision.time, decision.triggers, status))

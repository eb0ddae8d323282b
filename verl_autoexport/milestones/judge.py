"""The judge of a run: events of its steps in, decisions out. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from verl_autoexport.config.schema import TriggerConfig
from verl_autoexport.milestones.events import Decision, Milestone, StepEvent
from verl_autoexport.milestones.triggers import History, RunStart, build_policies, decide


class Judge:
    """Decides each logged step once, in order of steps.

    The event of the run's last step waits until training has ended, or until a later step is logged:
    `on_train_end` may become one more trigger of the same version.
    """

    def __init__(self, trigger: TriggerConfig) -> None:
        self.policies = build_policies(trigger)
        self.min_steps_between = trigger.min_steps_between
        self.history = History()
        self.start, self.last_step = RunStart(0, 0.0), None
        self.waiting: dict[int, StepEvent] = {}
        """Logged and not decided yet, by step."""

    def begin(self, start: RunStart, last_step: int | None, milestones: Iterable[Milestone]) -> None:
        """Training goes on from `start`; `milestones` are those of the past that it has."""
        self.start, self.last_step, self.history = start, last_step, History(milestones)

    def log(self, event: StepEvent) -> None:
        """A step is logged; the first event of a step counts."""
        self.waiting.setdefault(event.step, event)

    def end(self, succeeded: bool, logged_step: int) -> None:
        """Training has ended, after it logged `logged_step`: the event that waited for this may be the last one."""
        step = max(self.waiting, default=0)
        # Trained by this process, or by one that died before it could decide on its last step.
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
        """The decision on one event; without `spaced` also where the milestone before is too near."""
        return decide(self.policies, event, self.history, self.start, self.min_steps_between if spaced else 0)

    def decided(self, step: int) -> None:
        """Its event needs to wait no longer."""
        self.waiting.pop(step, None)

    def remember(self, decision: Decision, status: str) -> None:
        """Later decisions know what became of this one."""
        self.history.remember(Milestone(decision.step, decision.time, decision.triggers, status))

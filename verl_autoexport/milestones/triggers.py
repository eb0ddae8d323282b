"""Which steps become milestones. Pure: no clock, no state but the history of milestones.

A history is the content of registry and journal, cut at the step where the run resumed, so a
policy decides the same with or without a restart. A failed milestone counts as never fired:
its interval is due again and its value is no longer the best.
"""

from __future__ import annotations

import difflib
import math
import re
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache
from typing import Any, Protocol

from verl_autoexport.config.schema import ThresholdConfig, TriggerConfig, is_val
from verl_autoexport.errors import ConfigError
from verl_autoexport.milestones.events import (
    EARLIER_WEIGHTS,
    THESE_WEIGHTS,
    Decision,
    Milestone,
    StepEvent,
    Trigger,
    as_number,
)

_STANDING = frozenset({"pending", "published"})
_LISTED = 8


@dataclass(frozen=True)
class RunStart:
    """The start of this process's fit: the resumed step or 0, and the unix time."""

    step: int
    time: float


class History(Sequence[Milestone]):
    """The milestones by step, indexed for the questions that the policies ask at every step."""

    def __init__(self, milestones: Iterable[Milestone] = ()) -> None:
        self._by_step = {m.step: m for m in milestones}
        self._gather()

    @classmethod
    def of(cls, milestones: Sequence[Milestone]) -> History:
        return milestones if isinstance(milestones, cls) else cls(milestones)

    def __len__(self) -> int:
        return len(self._by_step)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Milestone]:
        return (self._by_step[step] for step in sorted(self._by_step))

    def get(self, step: int) -> Milestone | None:
        return self._by_step.get(step)

    def remember(self, milestone: Milestone) -> None:
        """Adds a milestone, which replaces an earlier one of its step."""
        before = self._by_step.get(milestone.step)
        self._by_step[milestone.step] = milestone
        if before is None:
            self._add(milestone)
        elif before != replace(milestone, status=before.status) or not {before.status, milestone.status} <= _STANDING:
            self._gather()  # a milestone that no longer counts cannot be taken out of a maximum

    def stands(self, step: int) -> bool:
        """Whether this step is published or pending."""
        return step in self._by_step and self._by_step[step].status in _STANDING

    def last_step(self, policy: str) -> int:
        return self._last.get(policy, 0)

    def times(self, policy: str) -> list[float]:
        """The times of the policy's milestones, in ascending order."""
        return self._times.get(policy, [])

    def fired(self, policy: str, name: str) -> bool:
        return (policy, name) in self._fired

    def best(self, name: str, metric: str, mode: str) -> tuple[float, int] | None:
        """The best value so far and its step; only published and pending milestones count."""
        return self._best.get((name, metric, mode))

    def _gather(self) -> None:
        self.last_standing: int | None = None
        self._last: dict[str, int] = {}
        self._times: dict[str, list[float]] = {}
        self._fired: set[tuple[str, str | None]] = set()
        self._best: dict[tuple[str | None, str | None, str | None], tuple[float, int]] = {}
        for milestone in self._by_step.values():
            self._add(milestone)

    def _add(self, milestone: Milestone) -> None:
        if milestone.status == "failed":
            return
        standing, step = milestone.status in _STANDING, milestone.step
        if standing:
            self.last_standing = max(step, self.last_standing or step)
        for t in milestone.triggers:
            self._last[t.policy] = max(step, self._last.get(t.policy, 0))
            insort(self._times.setdefault(t.policy, []), milestone.time)
            self._fired.add((t.policy, t.name))
            if t.policy == "best" and standing and t.value is not None:
                key, sign = (t.name, t.metric, t.mode), 1 if t.mode == "max" else -1
                known = self._best.get(key)
                if known is None or (sign * t.value, -step) > (sign * known[0], -known[1]):
                    self._best[key] = t.value, step


class Policy(Protocol):
    """One reason to export a step."""

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        """The trigger, if this policy wants `event.step`."""


@dataclass(frozen=True)
class EveryNSteps:
    """The first possible step in each interval of `n` since the last milestone; a crossed interval is not lost."""

    n: int

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        last = History.of(history).last_step("every_n_steps")
        due = event.step // self.n * self.n
        if due <= last:
            return None
        reason = f"step {due}: every {self.n} steps"
        if due != event.step:
            reason = f"step {event.step} is the first checkpoint after step {due} (every {self.n} steps)"
        return Trigger("every_n_steps", reason)


@dataclass(frozen=True)
class AtSteps:
    """The listed steps."""

    steps: tuple[int, ...]

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        return Trigger("at_steps", f"step {event.step} is listed") if event.step in self.steps else None


@dataclass(frozen=True)
class EverySeconds:
    """The first possible step `seconds` after the last milestone, or after the start."""

    seconds: float

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        fired = History.of(history).times("every_seconds")
        # A time in the future predates a change of the clock: one milestone comes early, instead of none for hours.
        known = fired[: bisect_right(fired, event.time)][-1:] if fired else [t for t in [start.time] if t <= event.time]
        passed = event.time - max(known, default=event.time - self.seconds)
        if passed < self.seconds:
            return None
        since = "the last one" if fired else "the start"
        return Trigger("every_seconds", f"{passed:.0f} s since {since} (every {self.seconds:g} s)")


@dataclass(frozen=True)
class OnSave:
    """Every checkpoint."""

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        return Trigger("on_save", f"checkpoint of step {event.step}") if event.saved else None


@dataclass(frozen=True)
class OnTrainEnd:
    """The final step of a training that succeeded."""

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        return Trigger("on_train_end", f"training ended at step {event.step}") if event.last else None


@dataclass(frozen=True)
class OnRequest:
    """A step that someone requested."""

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        return Trigger("on_request", f"requested at step {event.step}") if event.requested else None


@dataclass(frozen=True)
class Best:
    """A value better than all earlier ones by more than `min_delta`; of equal values the earliest stays."""

    name: str
    metric: str
    mode: str = "max"
    min_delta: float = 0.0

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        metric, value = _measure(self.metric, event.metrics)
        if metric is None or value is None:
            return None
        sign = 1 if self.mode == "max" else -1
        reason = f"{metric} = {value:.6g} is the first value"
        if best := History.of(history).best(self.name, metric, self.mode):
            before, step = best
            if not sign * (value - before) > self.min_delta:
                return None
            margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
            reason = f"{metric} = {value:.6g} is better than {before:.6g} of step {step}{margin}"
        return Trigger("best", reason, self.name, metric, value, self.mode)


@dataclass(frozen=True)
class Threshold:
    """A value strictly above (or below) `limit`; with `once`, only the first one."""

    name: str
    metric: str
    limit: float
    mode: str = "above"
    once: bool = True

    def decide(self, event: StepEvent, history: Sequence[Milestone], start: RunStart) -> Trigger | None:
        metric, value = _measure(self.metric, event.metrics)
        if metric is None or value is None:
            return None
        met = value > self.limit if self.mode == "above" else value < self.limit
        if not met or (self.once and History.of(history).fired("threshold", self.name)):
            return None
        reason = f"{metric} = {value:.6g} is {self.mode} {self.limit:g}"
        return Trigger("threshold", reason, self.name, metric, value, self.mode)


def build_policies(config: TriggerConfig) -> list[Policy]:
    """The policies that the configuration turns on."""
    policies: list[Policy] = []
    if config.every_n_steps is not None:
        policies.append(EveryNSteps(config.every_n_steps))
    if config.at_steps:
        policies.append(AtSteps(config.at_steps))
    if config.every_seconds is not None:
        policies.append(EverySeconds(config.every_seconds))
    flags = ((config.on_save, OnSave), (config.on_train_end, OnTrainEnd), (config.on_request, OnRequest))
    policies += [policy() for on, policy in flags if on]
    policies += [Best(b.name, b.metric, b.mode, b.min_delta) for b in config.best]
    policies += [_threshold(t) for t in config.threshold]
    return policies


def _threshold(t: ThresholdConfig) -> Threshold:
    if t.above is not None:
        return Threshold(t.name, t.metric, t.above, "above", t.once)
    if t.below is not None:
        return Threshold(t.name, t.metric, t.below, "below", t.once)
    raise ConfigError(f"threshold ({t.metric}): expected one of above, below; found none.")


def decide(
    policies: Iterable[Policy],
    event: StepEvent,
    history: Sequence[Milestone],
    start: RunStart,
    min_steps_between: int = 0,
) -> Decision | None:
    """One decision for the step with all its triggers, or None.

    Step 0, whose weights are untrained, is never chosen, and no step is chosen twice. `min_steps_between`
    holds back droppable triggers only; these leave no trace and are due again.
    """
    if event.step < 1:
        return None
    history = History.of(history)
    if history.stands(event.step):
        return None
    triggers = tuple(t for p in policies if (t := p.decide(event, history, start)))
    if not triggers:
        return None
    decision = Decision(event.step, event.time, triggers)
    last = history.last_standing
    if decision.droppable and last is not None and event.step - last < min_steps_between:
        return None
    return decision


def resolve_metric(pattern: str, metrics: Iterable[str]) -> str | None:
    """The one name that is or matches `pattern`; None if there is none, ConfigError if there are several."""
    names = metrics if isinstance(metrics, Mapping) else set(metrics)
    if pattern in names:
        return pattern
    matches = sorted(n for n in names if isinstance(n, str) and _glob(pattern).match(n))
    if len(matches) > 1:
        raise ConfigError(f"metric {pattern!r} matches several: {_list(matches)}. Name one of them.")
    return matches[0] if matches else None


@lru_cache
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))  # compiled once: this runs at every step of the run


def check_metrics(config: TriggerConfig, names: Iterable[str]) -> None:
    """Raises ConfigError if a metric of `best` or `threshold` matches none, or several, of the logged `names`."""
    names = set(names)
    for key, metric in config.metrics:
        try:
            found = resolve_metric(metric, names)
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from None
        if found is None:
            near = _near(metric, names)
            known = f"Near names: {_list(near)}." if near else f"Logged are: {_list(sorted(names)) or 'none'}."
            raise ConfigError(f"{key}: no logged metric is or matches {metric!r}. {known}")


def measured_on(triggers: Iterable[Trigger]) -> str | None:
    """The weights that the metrics of `triggers` measured; earlier ones if any metric did, None without a metric."""
    metrics = [t.metric for t in triggers if t.metric is not None]
    if not metrics:
        return None
    return THESE_WEIGHTS if all(map(is_val, metrics)) else EARLIER_WEIGHTS


def _measure(pattern: str, metrics: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The name and value of a metric; without a value if it is not a finite number."""
    try:
        name = resolve_metric(pattern, metrics)
    except ConfigError:  # matched once at the first validation, but several names now: no measurement either
        return None, None
    value = as_number(metrics[name]) if name is not None else None
    return name, value if value is not None and math.isfinite(value) else None


def _near(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that look like `pattern`, best first, then those that share its longest literal part."""
    names = sorted(names)
    close = difflib.get_close_matches(pattern, names, n=_LISTED, cutoff=0.6)
    part = max(re.split(r"[*?/\[\]]", pattern), key=len)
    return [*close, *(n for n in names if part and part in n and n not in close)]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more

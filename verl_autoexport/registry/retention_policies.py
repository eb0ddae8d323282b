"""Reasons for a version to stay, one small policy each. Pure: judged over the whole list of versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from verl_autoexport.milestones.events import is_measured
from verl_autoexport.registry import pointers
from verl_autoexport.registry.versions import NAME, Version

SUPERSEDED, LAST, MILESTONE, BEST, ALWAYS = range(5)
"""The worth of a version: `max_bytes` removes the lowest first, and never one that is kept ALWAYS.

The newest are the cheapest to lose, since training continues and makes the next ones.
"""


@dataclass(frozen=True)
class Kept:
    """A version, by its name, that a policy wants to stay; the reason, and its worth."""

    name: str
    worth: int
    reason: str


class RetentionPolicy(Protocol):
    """One reason to keep versions."""

    def keep(self, versions: Sequence[Version]) -> Iterable[Kept]:
        """The versions that should stay, out of all `versions`, by number."""
        ...


@dataclass(frozen=True)
class Pinned:
    """The versions that a person pinned."""

    def keep(self, versions: Sequence[Version]) -> Iterable[Kept]:
        return (Kept(v.name, ALWAYS, "pinned") for v in versions if v.pinned)


@dataclass(frozen=True)
class Pointed:
    """The targets of `latest` and every `best…`."""

    def keep(self, versions: Sequence[Version]) -> Iterable[Kept]:
        return (Kept(name, ALWAYS, pointer) for pointer, name in pointers.choose(versions).items())


@dataclass(frozen=True)
class Linked:
    """The targets of symbolic links that others made: `links` is link -> name, below the root."""

    links: Mapping[str, str]

    def keep(self, versions: Sequence[Version]) -> Iterator[Kept]:
        there, chosen = {v.name for v in versions}, pointers.choose(versions)
        for link, name in self.links.items():
            folder, inside, _ = link.partition("/")
            gone = inside and NAME.fullmatch(folder) and folder not in there  # its own links go with it
            if chosen.get(link) != name and not gone:
                yield Kept(name, ALWAYS, f"{link} links to it")


@dataclass(frozen=True)
class DecidesBest:
    """Keeps the newest claim on a pointer if older claims use another metric, which would otherwise win it."""

    def keep(self, versions: Sequence[Version]) -> Iterator[Kept]:
        chosen = pointers.choose(versions)
        for pointer, claims in pointers.claims(versions).items():
            newest = claims[-1]
            others = [v for v, t in claims if pointers.measure(t) != pointers.measure(newest[1])]
            target = next(v for v, _ in claims if v.name == chosen[pointer])
            if any(v.number > target.number for v in others):
                yield Kept(newest[0].name, ALWAYS, f"its metric decides the target of {pointer}")


@dataclass(frozen=True)
class Last:
    """The `n` highest steps."""

    n: int

    def keep(self, versions: Sequence[Version]) -> Iterable[Kept]:
        return (Kept(v.name, LAST, f"last={self.n}") for v in _live(versions)[-self.n :])


@dataclass(frozen=True)
class EveryNSteps:
    """The first version at or after each multiple of `n`."""

    n: int

    def keep(self, versions: Sequence[Version]) -> Iterator[Kept]:
        first: dict[int, Version] = {}
        for version in _live(versions):
            first.setdefault(version.step // self.n, version)
        for multiple in sorted(first.keys() - {0}):
            reason = f"every_n_steps={self.n}: the first from step {multiple * self.n} on"
            yield Kept(first[multiple].name, MILESTONE, reason)


@dataclass(frozen=True)
class Best:
    """The `n` best versions by the metric of each `best…`."""

    n: int

    def keep(self, versions: Sequence[Version]) -> Iterator[Kept]:
        for metric, ranking in ranked(versions):
            for rank, (version, value) in enumerate(ranking[: self.n], start=1):
                yield Kept(version.name, BEST, f"best={self.n}: number {rank} by {metric} ({value:.6g})")


@dataclass(frozen=True)
class WithinMaxBytes:
    """All versions, if `max_bytes` is the only rule."""

    def keep(self, versions: Sequence[Version]) -> Iterable[Kept]:
        return (Kept(v.name, SUPERSEDED if v.superseded else LAST, "within max_bytes") for v in versions)


def ranked(versions: Sequence[Version]) -> Iterator[tuple[str, list[tuple[Version, float]]]]:
    """For each `best…` the metric and the versions that measured it, best first; of equal ones the earliest first."""
    live = [v for v in versions if not v.superseded]
    for claims in pointers.claims(versions).values():
        metric, mode = pointers.measure(claims[-1][1])
        claimed = {v.name: t["value"] for v, t in claims if pointers.measure(t) == (metric, mode)}
        values = [(v, claimed.get(v.name, _measured(v, metric))) for v in live]
        sign = -1 if mode == "max" else 1
        measured = [(v, float(x)) for v, x in values if is_measured(x)]
        yield str(metric), sorted(measured, key=lambda found: (sign * found[1], *age(found[0])))


def age(version: Version) -> tuple[int, int]:
    return version.step, version.number


def _live(versions: Sequence[Version]) -> list[Version]:
    return sorted((v for v in versions if not v.superseded), key=age)


def _measured(version: Version, metric: Any) -> Any:
    return version.record.metrics.get(metric) if isinstance(metric, str) else None

"""Which versions stay. Pure: judged over the whole list, from nothing but the list.

What any key wants kept is kept; `max_bytes` then takes away the least valuable. `latest`, every
`best…` and pinned versions always stay. Judging again what was kept removes nothing more, and
no pointer moves because of what was removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl_autoexport.milestones.events import is_measured
from verl_autoexport.registry import pointers
from verl_autoexport.registry.versions import NAME, Version

# What max_bytes takes first. `last` is the cheapest to lose: training goes on and makes the next one.
_SUPERSEDED, _LAST, _MILESTONE, _BEST = range(4)


@dataclass(frozen=True)
class Keep:
    """The policy; a key that is None asks for nothing, and with none set everything stays.

    `last`: as many of the highest steps. `best`: as many of the best by the metric of each `best…`.
    `every_n_steps`: the first version at or after each multiple, for ever. `max_bytes`: in all.
    """

    last: int | None = None
    best: int | None = None
    every_n_steps: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{key}: expected a whole number from 1 on, found {value!r}")

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in asdict(self).items() if value is not None) or "all"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a version, and why, in a line."""

    version: Version
    keep: bool
    reason: str

    @property
    def nbytes(self) -> int:
        return nbytes(self.version)


@dataclass(frozen=True)
class Judgement:
    """A verdict for every version, by number; `removed` has the least valuable first."""

    verdicts: tuple[Verdict, ...]
    removed: tuple[Verdict, ...] = ()
    warnings: tuple[str, ...] = ()


def judge(versions: Iterable[Version], keep: Keep, links: Mapping[str, str] | None = None) -> Judgement:
    """Judges the whole list. `links` maps further names, such as links on disk, to directories that must stay.

    What stays is judged again: what had to stay only because of a version that goes may go with it.
    """
    final: dict[str, Verdict] = {}
    removed: list[Verdict] = []
    while True:
        once = _judge_once(versions, keep, links)
        final |= {v.version.name: v for v in once.verdicts}
        removed += once.removed
        if not once.removed:
            verdicts = sorted(final.values(), key=lambda v: (v.version.number, v.version.step))
            return Judgement(tuple(verdicts), tuple(removed), once.warnings)
        versions = [v.version for v in once.verdicts if v.keep]


def _judge_once(versions: Iterable[Version], keep: Keep, links: Mapping[str, str] | None) -> Judgement:
    versions = sorted(versions, key=lambda v: (v.number, v.step))
    if not keep:
        return Judgement(tuple(Verdict(v, True, "no rule is set, so everything stays") for v in versions))
    why: dict[str, list[str]] = {v.name: [] for v in versions}
    for name, reason in _never_removed(versions, links or {}):
        why.setdefault(name, []).append(reason)
    held = frozenset(name for name, reasons in why.items() if reasons)
    value: dict[str, int] = {}
    for version, worth, reason in _wanted(versions, keep):
        why[version.name].append(reason)
        value[version.name] = max(worth, value.get(version.name, worth))
    cut, warnings = _cut(versions, keep.max_bytes, held, value)
    if keep.best and not any(_ranked(versions)):
        warnings.append(f"best={keep.best} keeps nothing: no version was chosen by a `best` trigger")
    verdicts, removed = [], []
    for version in versions:
        reasons, kept = why[version.name], bool(why[version.name]) and version.name not in cut
        reason = "; ".join(reasons) or ("superseded by a rollback" if version.superseded else f"kept by none of {keep}")
        verdicts.append(Verdict(version, kept, cut.get(version.name, reason)))
        removed += [] if kept else [verdicts[-1]]
    removed.sort(key=lambda r: (r.version.name in cut, value.get(r.version.name, 0), *_turn(r.version)))
    return Judgement(tuple(verdicts), tuple(removed), tuple(warnings))


def nbytes(version: Version) -> int:
    """Bytes of its files, as its record lists them."""
    sizes = (f.get("bytes") for f in version.record.files if isinstance(f, Mapping))
    return sum(n for n in sizes if isinstance(n, int) and not isinstance(n, bool) and n > 0)


def stored(versions: Iterable[Version]) -> int:
    """Bytes that these take together: of a file that records call linked there is one, as long as any has it."""
    stock = _Stock()
    for version in versions:
        stock.add(version)
    return stock.total


class _Stock:
    """What versions take together, kept up to date as they come and go."""

    def __init__(self) -> None:
        self.total = 0
        self._names: Counter[tuple[str, int]] = Counter()  # of a shared file; files of its own are counted each
        self._own: Counter[tuple[str, int]] = Counter()

    def add(self, version: Version) -> None:
        self._count(version, 1)

    def remove(self, version: Version) -> None:
        self._count(version, -1)

    def _count(self, version: Version, sign: int) -> None:
        self.total += sign * nbytes(version)
        for file in (f for f in version.record.files if isinstance(f, Mapping)):
            digest, size = file.get("sha256"), file.get("bytes")
            if not isinstance(digest, str) or not isinstance(size, int) or isinstance(size, bool) or size <= 0:
                continue
            key, linked = (digest, size), file.get("linked") is True
            self.total -= self._once(key) + sign * size * linked
            (self._names if linked else self._own)[key] += sign
            self.total += self._once(key)

    def _once(self, key: tuple[str, int]) -> int:
        """Bytes of a file that only links are left of."""
        return key[1] if self._names[key] and not self._own[key] else 0


def show_size(n: int) -> str:
    """`n` bytes for a person, in the units that the configuration takes."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n >= scale:
            return f"{n / scale:.4g} {unit}"
    return f"{n} B"


def _turn(version: Version) -> tuple[bool, int, int]:
    return not version.superseded, *_age(version)


def _age(version: Version) -> tuple[int, int]:
    return version.step, version.number


def _never_removed(versions: Sequence[Version], links: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    chosen = pointers.choose(versions)
    yield from ((v.name, "pinned") for v in versions if v.pinned)
    yield from ((name, pointer) for pointer, name in chosen.items())
    there = {v.name for v in versions}
    for link, name in links.items():
        folder, inside, _ = link.partition("/")
        gone = inside and NAME.fullmatch(folder) and folder not in there  # and takes its own links with it
        if chosen.get(link) != name and not gone:
            yield name, f"{link} links to it"
    for pointer, claims in pointers.claims(versions).items():
        newest = claims[-1]
        others = [v for v, t in claims if pointers.measure(t) != pointers.measure(newest[1])]
        target = next(v for v, _ in claims if v.name == chosen[pointer])
        # Of two metrics under one name the newest decides; without it an older one would take the pointer over.
        if any(v.number > target.number for v in others):
            yield newest[0].name, f"its metric decides what {pointer} means"


def _wanted(versions: Sequence[Version], keep: Keep) -> Iterable[tuple[Version, int, str]]:
    """Version, worth and reason, for each key that wants it."""
    live = sorted((v for v in versions if not v.superseded), key=_age)
    if keep.last is not None:
        yield from ((v, _LAST, f"last={keep.last}") for v in live[-keep.last :])
    if keep.every_n_steps is not None:
        intervals: dict[int, Version] = {}
        for version in live:
            intervals.setdefault(version.step // keep.every_n_steps, version)
        for multiple in sorted(intervals.keys() - {0}):
            reason = f"every_n_steps={keep.every_n_steps}: the first from step {multiple * keep.every_n_steps} on"
            yield intervals[multiple], _MILESTONE, reason
    if keep.best is not None:
        for metric, ranking in _ranked(versions):
            for rank, (version, value) in enumerate(ranking[: keep.best], start=1):
                yield version, _BEST, f"best={keep.best}: number {rank} by {metric} ({value:.6g})"
    if keep.last is keep.every_n_steps is keep.best is None:
        yield from ((v, _SUPERSEDED if v.superseded else _LAST, "within max_bytes") for v in versions)


def _ranked(versions: Sequence[Version]) -> Iterable[tuple[str, list[tuple[Version, float]]]]:
    """For each `best…` its metric and all versions that measured it, the best first; of equals the earliest."""
    live = [v for v in versions if not v.superseded]
    for claims in pointers.claims(versions).values():
        metric, mode = pointers.measure(claims[-1][1])
        claimed = {v.name: t["value"] for v, t in claims if pointers.measure(t) == (metric, mode)}
        values = [(v, claimed.get(v.name, _measured(v, metric))) for v in live]
        sign = -1 if mode == "max" else 1
        measured = [(v, float(x)) for v, x in values if is_measured(x)]
        yield str(metric), sorted(measured, key=lambda found: (sign * found[1], *_age(found[0])))


def _measured(version: Version, metric: Any) -> Any:
    return version.record.metrics.get(metric) if isinstance(metric, str) else None


def _cut(
    versions: Sequence[Version], limit: int | None, held: frozenset[str], value: Mapping[str, int]
) -> tuple[dict[str, str], list[str]]:
    """What has to go for `max_bytes`, with the reason: by worth, then the lowest step first; never what is held."""
    cut: dict[str, str] = {}
    stock = _Stock()
    for version in versions:
        if version.name in held or version.name in value:
            stock.add(version)
    if limit is None or stock.total <= limit:
        return cut, []
    loose = [v for v in versions if v.name in value and v.name not in held]
    for version in sorted(loose, key=lambda v: (value[v.name], *_age(v))):
        if stock.total <= limit:
            break
        size = show_size(stock.total)
        cut[version.name] = f"max_bytes={limit}: {size} would stay, and of that it is the least valuable"
        stock.remove(version)
    if stock.total <= limit:
        return cut, []
    left = f"{sum(v.name in held for v in versions)} versions that are never removed hold {show_size(stock.total)}"
    return cut, [f"max_bytes={limit} cannot be met: the {left}; unpin what need not stay, or raise the limit"]


def from_dict(data: Mapping[str, Any]) -> Keep:
    """The policy in a journal entry; ValueError if it is none."""
    return Keep(**{key: data.get(key) for key in asdict(Keep())})

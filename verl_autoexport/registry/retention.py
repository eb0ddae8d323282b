"""The rules for which versions stay. Pure: each judgement depends on the whole list alone.

A version stays if any key wants it; `max_bytes` then removes the least valuable. `latest`, every
`best…` and pinned versions always stay. A second judgement of the kept versions removes nothing
more, and no removal moves a pointer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl_autoexport.registry.retention_policies import (
    ALWAYS,
    Best,
    DecidesBest,
    EveryNSteps,
    Last,
    Linked,
    Pinned,
    Pointed,
    RetentionPolicy,
    WithinMaxBytes,
    age,
    ranked,
)
from verl_autoexport.registry.versions import Version


@dataclass(frozen=True)
class Keep:
    """The retention policy; a key that is None has no effect, and with no key everything stays.

    `last`: the number of highest steps. `best`: the number of best versions by the metric of each `best…`.
    `every_n_steps`: the first version at or after each multiple, permanently. `max_bytes`: of all versions together.
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
    """The fate of one version, with the reason in one line."""

    version: Version
    keep: bool
    reason: str

    @property
    def nbytes(self) -> int:
        return nbytes(self.version)


@dataclass(frozen=True)
class RetentionPlan:
    """A verdict for every version, by number; `removed` has the least valuable first."""

    verdicts: tuple[Verdict, ...]
    removed: tuple[Verdict, ...] = ()
    warnings: tuple[str, ...] = ()


def plan_retention(versions: Iterable[Version], keep: Keep, links: Mapping[str, str] | None = None) -> RetentionPlan:
    """Judges the whole list. `links` maps further names, such as links on disk, to directories that must stay.

    The kept versions are judged again, since one that stayed only because of a removed version can be removed too.
    """
    final: dict[str, Verdict] = {}
    removed: list[Verdict] = []
    while True:
        once = _plan_once(versions, keep, links)
        final |= {v.version.name: v for v in once.verdicts}
        removed += once.removed
        if not once.removed:
            verdicts = sorted(final.values(), key=lambda v: (v.version.number, v.version.step))
            return RetentionPlan(tuple(verdicts), tuple(removed), once.warnings)
        versions = [v.version for v in once.verdicts if v.keep]


def _plan_once(versions: Iterable[Version], keep: Keep, links: Mapping[str, str] | None) -> RetentionPlan:
    versions = sorted(versions, key=lambda v: (v.number, v.step))
    if not keep:
        return RetentionPlan(tuple(Verdict(v, True, "no rule is set, so everything stays") for v in versions))
    why: dict[str, list[str]] = {v.name: [] for v in versions}
    value: dict[str, int] = {}
    for policy in _policies(keep, links or {}):
        for kept in policy.keep(versions):
            why.setdefault(kept.name, []).append(kept.reason)
            value[kept.name] = max(kept.worth, value.get(kept.name, kept.worth))
    cut, warnings = _cut(versions, keep.max_bytes, value)
    if keep.best and not any(ranked(versions)):
        warnings.append(f"best={keep.best} keeps nothing: no version was chosen by a `best` trigger")
    verdicts, removed = [], []
    for version in versions:
        reasons, kept = why[version.name], bool(why[version.name]) and version.name not in cut
        reason = "; ".join(reasons) or ("superseded by a rollback" if version.superseded else f"kept by none of {keep}")
        verdicts.append(Verdict(version, kept, cut.get(version.name, reason)))
        removed += [] if kept else [verdicts[-1]]
    removed.sort(key=lambda r: (r.version.name in cut, value.get(r.version.name, 0), *_turn(r.version)))
    return RetentionPlan(tuple(verdicts), tuple(removed), tuple(warnings))


def _policies(keep: Keep, links: Mapping[str, str]) -> Iterator[RetentionPolicy]:
    """The policies in `keep`, after those that always apply; the reasons have the same order."""
    yield from (Pinned(), Pointed(), Linked(links), DecidesBest())
    if keep.last is not None:
        yield Last(keep.last)
    if keep.every_n_steps is not None:
        yield EveryNSteps(keep.every_n_steps)
    if keep.best is not None:
        yield Best(keep.best)
    if keep.last is keep.every_n_steps is keep.best is None:
        yield WithinMaxBytes()


def nbytes(version: Version) -> int:
    """The bytes of a version's files, as its record lists them."""
    sizes = (f.get("bytes") for f in version.record.files if isinstance(f, Mapping))
    return sum(n for n in sizes if isinstance(n, int) and not isinstance(n, bool) and n > 0)


def stored(versions: Iterable[Version]) -> int:
    """The bytes of these versions together; a file that their records call linked counts once while any has it."""
    stock = _Stock()
    for version in versions:
        stock.add(version)
    return stock.total


class _Stock:
    """The bytes of versions together, updated as versions come and go."""

    def __init__(self) -> None:
        self.total = 0
        self._names: Counter[tuple[str, int]] = Counter()  # of shared files; other files count each
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
        """The bytes of a file that exists only as links."""
        return key[1] if self._names[key] and not self._own[key] else 0


def show_size(n: int) -> str:
    """`n` bytes for a person, in the units that the configuration takes."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n >= scale:
            return f"{n / scale:.4g} {unit}"
    return f"{n} B"


def _turn(version: Version) -> tuple[bool, int, int]:
    return not version.superseded, *age(version)


def _cut(versions: Sequence[Version], limit: int | None, value: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """The versions to remove for `max_bytes`, with the reason: by worth, then the lowest step first."""
    cut: dict[str, str] = {}
    stock = _Stock()
    for version in (v for v in versions if v.name in value):
        stock.add(version)
    if limit is None or stock.total <= limit:
        return cut, []
    loose = [v for v in versions if value.get(v.name, ALWAYS) < ALWAYS]
    for version in sorted(loose, key=lambda v: (value[v.name], *age(v))):
        if stock.total <= limit:
            break
        size = show_size(stock.total)
        cut[version.name] = f"max_bytes={limit}: {size} would stay, and of that it is the least valuable"
        stock.remove(version)
    if stock.total <= limit:
        return cut, []
    held = sum(value.get(v.name) == ALWAYS for v in versions)
    left = f"{held} versions that are never removed hold {show_size(stock.total)}"
    return cut, [f"max_bytes={limit} cannot be met: the {left}; unpin some of them, or raise the limit"]


def from_dict(data: Mapping[str, Any]) -> Keep:
    """The policy in a journal entry; ValueError if it is none."""
    return Keep(**{key: data.get(key) for key in asdict(Keep())})

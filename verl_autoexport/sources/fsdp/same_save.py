"""A check that rank files are from one save, from the files beside them; standard library only.

Nothing is unpickled: only two numbers are looked up in the scheduler's state that verl saves with each rank.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from verl_autoexport.errors import SourceError

_APART_S = 3600.0
"""Ranks save at the same time: a file written so much earlier or later is probably from another save."""
_MAX_PICKLE = 16 << 20  # bytes; a scheduler and the states of random generators take some kB
_COUNTERS = ("last_epoch", "_step_count")
_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_STEP = re.compile(r"global_step_([0-9]{1,18})")


def check_one_save(paths: Sequence[Path]) -> list[str]:
    """Raises SourceError if the rank files (in order of rank) are from different saves; notes if that is probable."""
    check_schedulers(paths, list(map(scheduler_at, paths)))
    return list(doubts(paths[0].parent.parent, paths, _by_rank))


def _by_rank(rank: int) -> tuple[str, str]:
    return f"the file of rank {rank}", f"that of rank {rank}"


def check_schedulers(paths: Sequence[Path], found: Sequence[tuple[tuple[str, int], ...]]) -> None:
    """Raises SourceError unless all results of `scheduler_at` are the same."""
    known = {rank: counters for rank, counters in enumerate(found) if counters}
    first = min(known, default=0)
    for rank, counters in known.items():
        if counters != known[first]:
            raise SourceError(
                f"{paths[0].parent}: the files are of different saves: beside rank {first} the scheduler is at "
                f"{dict(known[first])}, beside rank {rank} at {dict(counters)} ({_companion(paths[rank]).name}). Copy "
                "all files of the step again, from one save."
            )


def doubts(step: Path, paths: Sequence[Path], called: Callable[[int], tuple[str, str]]) -> Iterator[str]:
    """Notes where the times of a step's files make it likely that they are not of one complete save.

    `called` gives the two names, one after the other in a sentence, of file number i.
    """
    try:
        times = [path.stat().st_mtime for path in paths]
    except OSError:
        return  # its reader reports the problem
    old, new = times.index(min(times)), times.index(max(times))
    if times[new] - times[old] > _APART_S:
        yield (
            f"{called(new)[0]} was written {_span(times[new] - times[old])} after {called(old)[1]}: they may be of "
            "different saves"
        )
    # verl writes its data.pt after all models
    saved = _number_of(lambda: (step / "data.pt").stat().st_mtime)
    if saved is not None and times[new] - saved > _APART_S:
        yield (
            f"{called(new)[0]} was written {_span(times[new] - saved)} after data.pt, the last file of a save: it may "
            "be of a later one"
        )
    named = _STEP.fullmatch(step.name)
    latest = _number_of(lambda: int((step.parent / "latest_checkpointed_iteration.txt").read_text()[:20]))
    if named and latest is not None and latest < int(named[1]):
        yield (
            f"latest_checkpointed_iteration.txt says {latest:g}: the save of step {named[1]} was not completed, or the "
            "run went back"
        )


def _number_of(read: Callable[[], float]) -> float | None:
    try:
        return read()
    except (OSError, ValueError):
        return None


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _companion(path: Path) -> Path:
    return path.with_name(path.name.replace("model_", "extra_state_", 1))


def scheduler_at(path: Path) -> tuple[tuple[str, int], ...]:
    """The progress of the scheduler when verl saved a rank's file; empty if it is unknown."""
    found: dict[str, int] = {}
    try:
        fd = os.open(_companion(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file, zipfile.ZipFile(file) as archive:
            (record,) = (r for r in archive.infolist() if r.filename.endswith("/data.pkl"))
            if record.file_size > _MAX_PICKLE or record.compress_type != zipfile.ZIP_STORED:
                return ()
            key = None
            for op, value, _ in pickletools.genops(archive.read(record)):
                if key in _COUNTERS and type(value) is int and op.name not in _STORES:
                    found.setdefault(key, value)
                key = key if op.name in _STORES else value
                if len(found) == len(_COUNTERS):
                    break
    except Exception:  # noqa: BLE001 - damaged or missing; it is not exported anyway
        return ()
    return tuple(sorted(found.items()))

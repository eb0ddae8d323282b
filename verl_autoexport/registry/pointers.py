"""`latest` and `best`: the versions that they mean, and the links that show them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl_autoexport.milestones.events import is_measured
from verl_autoexport.registry.versions import NAME, Version
from verl_autoexport.system.durable_files import fsync_dir, temp_path

LATEST = "latest"
_LISTED = 20
POINTER = re.compile(r"latest|best(-[A-Za-z0-9._-]{1,100})?")
Claim = tuple[Version, Mapping[str, Any]]
"""A version and the `best` trigger that chose it."""


def choose(versions: Iterable[Version]) -> dict[str, str]:
    """Pointer -> directory name, for every pointer that `versions` define; superseded versions do not count."""
    live = sorted((v for v in versions if not v.superseded), key=lambda v: v.number)
    if not live:
        return {}
    chosen = {LATEST: max(live, key=lambda v: (v.step, v.number)).name}
    return chosen | {name: _best(claim).name for name, claim in claims(live).items()}


def matching(versions: Sequence[Version], spec: str) -> list[Version]:
    """The versions that `spec` means: a full name, a number, `step…` (the newest), or a pointer."""
    if number := re.fullmatch(r"v?([0-9]{1,18})", spec):
        return [v for v in versions if v.number == int(number[1])]
    if step := re.fullmatch(r"step([0-9]{1,18})", spec):
        same = [v for v in versions if v.step == int(step[1])]
        return sorted(same, key=lambda v: (not v.superseded, v.number))[-1:]
    name = choose(versions).get(spec, spec)
    return [v for v in versions if v.name == name]


def listing(versions: Sequence[Version]) -> str:
    """The newest names that `matching` accepts, for a message."""
    names = [v.name for v in versions]
    return ", ".join(["…"] * (len(names) > _LISTED) + names[-_LISTED:] + sorted(choose(versions))) or "none yet"


def claims(versions: Iterable[Version]) -> dict[str, list[Claim]]:
    """`best…` -> the versions that a trigger of this name chose, by number, without superseded ones."""
    found: dict[str, list[Claim]] = {}
    for version in sorted((v for v in versions if not v.superseded), key=lambda v: v.number):
        for trigger in filter(_claims_best, version.record.triggers):
            found.setdefault(_pointer(trigger), []).append((version, trigger))
    return {name: claim for name, claim in found.items() if POINTER.fullmatch(name)}


def measure(trigger: Mapping[str, Any]) -> tuple[Any, str]:
    """The metric and mode of a trigger; only values with the same of both can be compared."""
    return trigger.get("metric"), trigger["mode"]


def links(root: Path) -> dict[str, str]:
    """The symbolic links below `root`, except in versions, that lead to a version or into it, whoever made them."""
    return _leading_to_versions(root, _symlinks(root))


def inner_links(root: Path, names: Iterable[str]) -> dict[str, str]:
    """The links that lie in the versions `names` and lead to another version."""
    inside = (path for name in names for path in _symlinks(root / name))
    return {path: name for path, name in _leading_to_versions(root, inside).items() if Path(path).parts[0] != name}


def _leading_to_versions(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    here, found = os.stat(root), {}
    for path in sorted(paths):
        end = Path(os.path.realpath(path))
        for folder in (end, *end.parents):
            # Many paths may reach the same directory, so directories are compared, not paths.
            if NAME.fullmatch(folder.name) and _is_same(folder.parent, here):
                found[str(path.relative_to(root))] = folder.name
                break
    return found


def _symlinks(folder: Path) -> Iterator[Path]:
    with suppress(PermissionError, FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield folder / entry.name
            elif not entry.name.startswith(".") and not NAME.fullmatch(entry.name) and entry.is_dir():
                yield from _symlinks(folder / entry.name)


def _is_same(folder: Path, known: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(folder), known)
    except OSError:
        return False


def _pointer(trigger: Mapping[str, Any]) -> str:
    return "best" if trigger.get("name") in (None, "best") else f"best-{trigger['name']}"


def _claims_best(trigger: Mapping[str, Any]) -> bool:
    return (
        trigger.get("policy") == "best" and is_measured(trigger.get("value")) and trigger.get("mode") in ("max", "min")
    )


def _best(claims: list[Claim]) -> Version:
    # Values of another metric, from before a change of the configuration, are not comparable: the newest decides.
    _, newest = claims[-1]
    same = [(v, t) for v, t in claims if measure(t) == measure(newest)]
    sign = -1 if newest["mode"] == "max" else 1
    return min(same, key=lambda claim: (sign * claim[1]["value"], claim[0].step, claim[0].number))[0]


def link(root: Path, pointers: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Makes the links in `root` equal `pointers`; returns the changes, and warnings for failed ones."""
    changed, warnings = [], []
    for name, target in pointers.items():
        path = root / name
        if os.path.lexists(path) and not path.is_symlink():
            warnings.append(f"{path}: not a link, so it was left alone; it should point to {target}: move it away")
            continue
        if _target(path) == target:
            continue
        try:
            _replace_link(path, target)
            changed.append(f"{path}: now points to {target}")
        except OSError as e:
            warnings.append(f"{path}: no link to {target} can be made ({e}); only registry.json has it")
    for path in _stale(root, pointers):
        path.unlink(missing_ok=True)
        changed.append(f"{path}: removed, since no version remains for it")
    if changed:
        fsync_dir(root)
    return changed, warnings


def _stale(root: Path, pointers: Mapping[str, str]) -> list[Path]:
    # A link to anything but a version is not ours.
    names = [n for n in sorted(os.listdir(root)) if POINTER.fullmatch(n) and n not in pointers]
    return [root / n for n in names if NAME.fullmatch(_target(root / n) or "")]


def _target(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _replace_link(path: Path, target: str) -> None:
    temp = temp_path(path)
    try:
        os.symlink(target, temp)
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise

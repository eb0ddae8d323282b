"""`latest` and `best`: which versions they mean, and the links that say so."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl_autoexport.registry.files import fsync_dir, temp_path
from verl_autoexport.registry.versions import NAME, Version

LATEST = "latest"
POINTER = re.compile(r"latest|best(-[A-Za-z0-9._-]{1,100})?")


def choose(versions: Iterable[Version]) -> dict[str, str]:
    """Pointer -> directory name, for every pointer that `versions` give rise to. Superseded ones count for none."""
    live = sorted((v for v in versions if not v.superseded), key=lambda v: v.number)
    if not live:
        return {}
    chosen = {LATEST: max(live, key=lambda v: (v.step, v.number)).name}
    claims: dict[str, list[tuple[Version, Mapping[str, Any]]]] = {}
    for version in live:
        for trigger in filter(_claims_best, version.record.triggers):
            claims.setdefault(_pointer(trigger), []).append((version, trigger))
    return chosen | {name: _best(claim).name for name, claim in claims.items() if POINTER.fullmatch(name)}


def _pointer(trigger: Mapping[str, Any]) -> str:
    return "best" if trigger.get("name") in (None, "best") else f"best-{trigger['name']}"


def _claims_best(trigger: Mapping[str, Any]) -> bool:
    value = trigger.get("value")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return trigger.get("policy") == "best" and is_number and trigger.get("mode") in ("max", "min")


def _best(claims: list[tuple[Version, Mapping[str, Any]]]) -> Version:
    # Values of another metric, from before the configuration changed, are not comparable: the newest decides.
    _, newest = claims[-1]
    same = [(v, t) for v, t in claims if (t.get("metric"), t["mode"]) == (newest.get("metric"), newest["mode"])]
    sign = -1 if newest["mode"] == "max" else 1
    return min(same, key=lambda claim: (sign * claim[1]["value"], claim[0].step, claim[0].number))[0]


def link(root: Path, pointers: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Makes the links in `root` say `pointers`; returns what it changed, and warnings for what it could not."""
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
            warnings.append(f"{path}: no link to {target} can be made ({e}); registry.json alone holds it")
    for path in _stale(root, pointers):
        path.unlink(missing_ok=True)
        changed.append(f"{path}: removed, no version is left for it")
    if changed:
        fsync_dir(root)
    return changed, warnings


def _stale(root: Path, pointers: Mapping[str, str]) -> list[Path]:
    # A link to anything but a version was made by somebody else.
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

"""The free host memory for this process: its control groups' limits (v1 and v2), and the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_SHARE = 0.95  # of a limit; the rest is left to others
_NO_LIMIT = 1 << 60  # version 1 writes a huge number if there is no limit


def headroom(root: Path = Path("/")) -> int:
    """Bytes that can be taken before a limit is near; reclaimable memory (the page cache) counts as free.

    `root` is the directory with `proc` and `sys`.
    """
    left = [_available(root), *_groups(root)]
    return max(0, int(min(left)))


def _available(root: Path) -> float:
    for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return _SHARE * int(value.split()[0]) * 1024
    return float("inf")


def _groups(root: Path) -> Iterator[float]:
    """The free bytes of every group of this process up to the top, since a higher limit applies to all groups below."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):  # in a container the path may be the one outside; then only the top exists
            if (found := _left(mount / group, *names)) is not None:
                yield found


def _left(group: Path, limit_name: str, usage_name: str) -> float | None:
    try:
        names = (limit_name, usage_name, "memory.stat")
        limit, used, held = ((group / name).read_text(encoding="utf-8").strip() for name in names)
        bytes_used, stat = int(used), dict(line.split() for line in held.splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) > _NO_LIMIT:
        return None
    prefix = "total_" if "total_inactive_file" in stat else ""  # version 1 counts the groups below separately
    cache = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return _SHARE * int(limit) - (bytes_used - cache)

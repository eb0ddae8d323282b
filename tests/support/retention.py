"""Registries with versions to remove, and what must not change when they go."""

from __future__ import annotations

from pathlib import Path

from tests.support.registry import best, links, names, publish
from verl_autoexport.registry.store import Registry


def memory(registry: Registry) -> dict:
    return {
        "milestones": [(m.step, m.status, m.triggers) for m in registry.milestones()],
        "outcomes": [(o["step"], o["event"]) for o in registry.outcomes()],
        "exported": [(e.name, e.fingerprint) for e in registry.exported()],
        "pointers": registry.pointers(),
    }


def fill(registry: Registry, n: int = 6) -> None:
    """Versions of the steps 1 to n; 2 was the best, 1 is pinned, the last is of an abandoned past."""
    for step in range(1, n + 1):
        publish(registry, step, *[best(0.9)] * (step == 2), files=({"name": "sub/model.safetensors", "bytes": 7},))
    registry.pin("step1")
    registry.supersede_after(n - 1)


def removals(registry: Registry) -> list[tuple[str, str]]:
    entries = registry.journal_entries()[0]
    removing = ("removed", "deleted", "delete_failed")
    return [(e["event"], e.get("version") or e["path"]) for e in entries if e["event"] in removing]


def check_whole(root: Path) -> None:
    """Every version that can be seen, through the registry or not, is whole, and every link leads to one."""
    for path in [p.parent for p in root.glob("v*/export.json")]:
        assert (path / "sub/model.safetensors").read_bytes() == b"weights"
    assert {*names(Registry(root))} <= {p.parent.name for p in root.glob("v*/export.json")}
    assert all((root / name / "export.json").is_file() for name in links(root))

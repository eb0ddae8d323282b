"""The rooms of the package, and which may import which."""

from __future__ import annotations

from collections.abc import Mapping

PACKAGE = "verl_autoexport"

# room -> the rooms that it may import besides itself; imports go up this list, never down.
ROOMS: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "system": frozenset({"errors", "__init__"}),
    "config": frozenset({"errors", "system"}),
    "milestones": frozenset({"errors", "system", "config"}),
    "shards": frozenset({"errors", "system"}),
    "sources": frozenset({"errors", "system", "shards"}),
    "registry": frozenset({"errors", "system", "milestones"}),
    "merge": frozenset({"errors", "system", "shards", "__init__"}),
    "model": frozenset({"errors", "system", "config", "shards", "sources", "merge"}),
    "verify": frozenset({"errors", "system", "shards", "sources", "registry", "merge", "model"}),
    "export": frozenset({
        "errors", "system", "config", "milestones", "shards", "sources", "registry", "merge", "model", "verify",
        "__init__",
    }),
    "publishers": frozenset({"errors", "system", "registry"}),
    "service": frozenset({
        "errors", "system", "config", "milestones", "shards", "sources", "registry", "merge", "model", "export",
        "publishers",
    }),
    "trainers": frozenset({"errors", "system", "config", "milestones", "sources", "registry", "model", "service"}),
    "cli": frozenset({
        "errors", "system", "config", "milestones", "shards", "sources", "registry", "merge", "export", "verify",
        "__init__",
    }),
    "__init__": frozenset({"errors", "registry", "export", "trainers"}),  # for type checkers; at run time on first use
    "__main__": frozenset({"cli"}),
    "hydra_plugins": frozenset({"config"}),
}  # fmt: skip

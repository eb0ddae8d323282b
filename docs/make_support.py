"""Writes the table of releases in `trainers.md` beside this file, from `tests/matrix/results.json`: `make docs`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

PAGE = Path(__file__).with_name("trainers.md")
RESULTS = Path(__file__).parents[1] / "tests" / "matrix" / "results.json"
BEGIN, END = "<!-- from tests/matrix/results.json, by `make docs` -->\n", "<!-- end -->\n"
HEAD = "| verl | torch, transformers, Ray | Trainer | Weights came from |\n|---|---|---|---|\n"


def table() -> str:
    """A line for each release, environment and trainer that `make test-matrix` ran to its end."""
    sources: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, found in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        verl, trainer, source = key.split(" | ")
        packages = ", ".join(found[name].partition("+")[0] for name in ("torch", "transformers", "ray"))
        sources[verl, packages, trainer].append({"live": "running workers"}.get(source, "checkpoints"))
    lines = (f"| {' | '.join(key)} | {', '.join(found)} |\n" for key, found in sorted(sources.items(), reverse=True))
    return HEAD + "".join(lines)


def page() -> str:
    """The whole page, with a new table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

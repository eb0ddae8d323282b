"""Kills at any moment of an export lose nothing, show nothing that is not whole, and leave nothing behind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import chaos
from tests.support.repository import environment
from verl_autoexport.registry.store import Registry

KINDS = (*((phase, False) for phase in chaos.PHASES), ("write", True))
"""Phase, and whether the merge's own process is meant."""


class Chaos:
    """A run directory and the processes at work in it."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.root, self.log = folder / "run", (folder / "log.txt").open("w")
        (self.root / "exports").mkdir(parents=True)
        self.zygote = self.start("zygote", str(self.root), str(source))
        self.reader = self.start("reader", str(self.root / "exports"))
        self.kills: Counter[tuple[str, bool]] = Counter()

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", chaos.__name__, *args]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            env=environment(),
        )

    def run(self, steps: int = 1, **kill: Any) -> bool:
        """One start of the run; whether something was killed in it."""
        self.zygote.stdin.write(json.dumps({"steps": steps, "kill": kill}) + "\n")
        answer = json.loads(self.zygote.stdout.readline())
        expected = -9 if answer["killed"] and not kill["merge"] else 0
        assert answer["code"] == expected, Path(self.log.name).read_text()[-4000:]
        self.kills[kill.get("phase"), kill.get("merge")] += answer["killed"]
        return answer["killed"]

    def counts(self) -> dict[str, int]:
        """Calls in each phase of one whole export, versions to remove included."""
        self.run(steps=3)
        self.run(steps=1)
        return json.loads((self.root.parent / "counts.json").read_text())

    def end(self) -> dict[str, Any]:
        """The last start, which nobody disturbs; what the reader saw."""
        self.run()
        seen, _ = self.reader.communicate()
        return json.loads(seen)

    def check(self, seen: dict[str, Any]) -> None:
        registry = Registry(self.root / "exports")
        assert seen["wrong"] == []
        assert seen["looks"] > sum(self.kills.values())
        last = max(map(chaos.step_of, self.root.glob("global_step_*")))
        published = [e["step"] for e in registry.journal_entries()[0] if e["event"] == "published"]
        assert sorted(published) == list(range(1, last + 1)), "every step once, none lost, none twice"
        assert [v.step for v in registry.versions()] == [last - 1, last]
        assert registry.outcomes() == registry.invalid() == []
        assert chaos.leftovers(self.root) == []
        assert registry.recover() == []
        assert chaos.look(registry.root) == (2, [])


@contextmanager
def chaotic(folder: Path, source: Path) -> Iterator[Chaos]:
    made = Chaos(folder, source)
    try:
        yield made
    finally:
        for process in (made.zygote, made.reader):
            process.kill()
            process.communicate()
        made.log.close()


def torment(folder: Path, source: Path, kills: int, seed: int) -> tuple[Counter[tuple[str, bool]], dict[str, Any]]:
    """At least `kills` of every kind, each at a random call of its phase, then peace."""
    rng = random.Random(seed)
    with chaotic(folder, source) as run:
        counts = run.counts()
        order = list(KINDS) * kills
        rng.shuffle(order)
        for phase, merge in order:
            while not run.run(
                phase=phase, merge=merge, index=rng.randint(1, counts.get(phase, 10)), after=rng.random() < 0.5
            ):
                pass
        run.check(run_seen := run.end())
        return run.kills, run_seen


def test_a_few_kills_in_every_phase(source, tmp_path):
    kills, seen = torment(tmp_path, source, kills=8, seed=1)
    assert all(kills[kind] == 8 for kind in KINDS), kills
    assert seen["versions"] > 20


@pytest.mark.full
def test_more_than_a_thousand_kills(source, tmp_path):
    kills, seen = torment(tmp_path, source, kills=150, seed=2)
    print(f"kills: {dict(kills)}; reader: {seen['looks']} looks at {seen['versions']} versions")
    assert all(kills[kind] >= 150 for kind in KINDS), kills

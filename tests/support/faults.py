"""One export in which one change to the disk fails, for each line on stdin, in a process forked from a warm one.

`LD_PRELOAD=faults.so python -m tests.support.faults FOLDER SOURCE`. The parent has a run with one version and one more
saved step as a template; each child takes a copy, arms the fault, exports that step, disarms it, and tells what it
found.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.support import chaos
from verl_autoexport.errors import AutoExportError
from verl_autoexport.registry.store import Registry

FAULTS = ctypes.CDLL(None)
STEP = 2


class Run:
    """A run in `root` with the package's own actor, in this process."""

    def __init__(self, root: Path) -> None:
        from verl_autoexport.config.reading import load_config
        from verl_autoexport.merge.local_runner import LocalRunner
        from verl_autoexport.service.exporter import Exporter
        from verl_autoexport.sources import holds

        node = {"output_dir": str(root / "exports"), "verify": {"load": False}, "keep": {"last": 1}}
        self.root, self.actor = root, Exporter(load_config(node), LocalRunner(1))
        for hold in holds.find_holds(root):
            self.actor.export(chaos.request_for(hold))

    def save(self, source: Path, step: int) -> None:
        shutil.copytree(source, self.root / f"global_step_{step}")

    def export(self, step: int) -> dict[str, Any]:
        """As the driver does it."""
        from verl_autoexport.sources import holds

        try:
            hold = holds.make_hold(self.root / f"global_step_{step}", step, "actor")
        except AutoExportError as e:
            return {"status": "failed", "reason": f"{type(e).__name__}: {e}"}
        try:
            holds.choose(hold, chaos.request_for(hold).to_json())
        except OSError as e:
            print(f"not durable: {e}", file=sys.stderr)
        return vars(self.actor.export(chaos.request_for(hold)))


def attempt(root: Path, source: Path, order: dict[str, Any]) -> dict[str, Any]:
    run = Run(root)
    FAULTS.fault_arm(str(root).encode(), order["nth"], order["err"], order["sticky"])
    try:
        outcome = run.export(STEP)
    finally:
        calls = FAULTS.fault_disarm()
    registry = Registry(root / "exports")
    found = {
        "calls": calls, "call": FAULTS.fault_last().decode(), "outcome": outcome, "wrong": chaos.look(registry.root)[1],
        "steps": [v.step for v in registry.versions()], "left": chaos.leftovers(root),
    }  # fmt: skip
    run.save(source, STEP + 1)
    found["next"] = run.export(STEP + 1)
    Run(root)  # the next start
    found["left_at_last"] = chaos.leftovers(root)
    found["wrong"] += chaos.look(registry.root)[1] + [why for _, why in registry.invalid()]
    found["last"] = [v.step for v in registry.versions()]
    found["repaired"] = registry.recover()
    return found


def main(folder: Path, source: Path) -> None:
    FAULTS.fault_last.restype = ctypes.c_char_p
    FAULTS.fault_disarm.restype = ctypes.c_long
    FAULTS.fault_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    chaos.warm_up(source, folder / "warm")
    if (pid := os.fork()) == 0:
        run = Run(folder / "template")
        run.save(source, STEP - 1)
        assert run.export(STEP - 1)["status"] == "published"
        run.save(source, STEP)
        os._exit(0)
    os.waitpid(pid, 0)
    for number, line in enumerate(sys.stdin):
        answer = folder / "answer.json"
        if (pid := os.fork()) == 0:
            try:
                root = folder / f"run{number}"
                shutil.copytree(folder / "template", root, symlinks=True)
                answer.write_text(json.dumps(attempt(root, source, json.loads(line))))
                shutil.rmtree(root)
            except BaseException:  # noqa: BLE001 - told, then the process ends
                answer.write_text(json.dumps({"error": traceback.format_exc()}))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        print(answer.read_text(), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

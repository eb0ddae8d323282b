"""What becomes of the hold on a chosen step when its export fails, or when the run directory is moved meanwhile."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos import request_for
from verl_autoexport.config.reading import load_config
from verl_autoexport.export.pipeline import export_to_registry
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.exporter import Exporter
from verl_autoexport.service.request import ExportRequest
from verl_autoexport.sources import holds
from verl_autoexport.system.deadlines import start as begin

STEP = 2


@pytest.fixture
def run(source, tmp_path) -> Callable[[], Path]:
    """A run directory in which a step is chosen, and verl has rotated its checkpoint away."""
    root = tmp_path / "run"
    checkpoint = Path(shutil.copytree(source, root / f"global_step_{STEP}"))
    hold = holds.make_hold(checkpoint, STEP, "actor")
    holds.choose(hold, request_for(hold).to_json())
    return root


def rotate(root: Path) -> None:
    shutil.rmtree(root / f"global_step_{STEP}")


def moved(root: Path) -> Path:
    """To another disk, as `cp -a` does it: links become files, what is gone from the old one is gone."""
    there = root.with_name("other")
    subprocess.run(["cp", "-a", root, there], check=True)
    shutil.rmtree(root)
    return there


def start(root: Path) -> dict[str, Any]:
    """What the next start of the run does with its one hold, by the exporter alone."""
    settings = load_config({"output_dir": str(root / "exports"), "verify": {"load": False}})
    (hold,) = holds.find_holds(root)
    where = {"pin": str(hold.path), "directory": str(hold.directory), "origin": hold.origin}
    request = ExportRequest.from_json({**hold.request, **where}, STEP)
    return vars(Exporter(settings, LocalRunner(1)).export(request))


def spoil(root: Path) -> Callable[[], None]:
    """What makes every export of the hold fail; returns what repairs it."""
    (hold,) = holds.find_holds(root)
    config = hold.path / "huggingface/config.json"
    kept = config.rename(config.with_suffix(".away"))
    return lambda: kept.rename(config)


def attempts(root: Path) -> int:
    (hold,) = holds.find_holds(root)
    return hold.request.get("attempts", 0)


def test_a_run_directory_that_was_copied_to_another_disk(run):
    rotate(run)
    there = moved(run)
    (hold,) = holds.find_holds(there)
    assert hold.origin == str(there / f"global_step_{STEP}/actor")
    assert start(there)["status"] == "published"
    assert holds.find_holds(there) == []
    assert [v.step for v in Registry(there / "exports").versions()] == [STEP]


def test_a_failure_keeps_the_last_copy(run):
    rotate(run)
    repair = spoil(run)
    for number in (1, 2):
        assert start(run)["status"] == "failed"
        assert attempts(run) == number
    repair()
    assert start(run)["status"] == "published"
    assert holds.find_holds(run) == []


def test_a_failure_releases_what_the_checkpoint_still_has(run):
    spoil(run)
    assert start(run)["status"] == "failed"
    assert holds.find_holds(run) == []
    assert (run / f"global_step_{STEP}/actor").is_dir()


def test_a_failure_keeps_it_where_the_checkpoint_was_saved_anew(run, own_checkpoint):
    """Another save, in new files: the links are of the one that was chosen."""
    rotate(run)
    shutil.copytree(own_checkpoint("even"), run / f"global_step_{STEP}")
    spoil(run)
    assert start(run)["status"] == "failed"
    assert attempts(run) == 1


def test_content_that_is_another_fails_and_is_kept(run, own_checkpoint):
    rotate(run)
    (hold,) = holds.find_holds(run)
    for file in (own_checkpoint("even") / "actor").glob("*.pt"):
        (hold.path / file.name).write_bytes(file.read_bytes())
    outcome = start(run)
    assert "the shards of step 2 have changed since it was chosen" in outcome["reason"]
    assert attempts(run) == 1


def test_a_kept_step_can_be_exported_by_hand(run):
    rotate(run)
    (hold,) = holds.find_holds(run)
    version = export_to_registry(
        checkpoint_spec(hold.path, verify=False), Registry.create(run / "exports"), LocalRunner(1)
    )
    assert version.step == STEP


def test_a_trigger_that_gives_no_reason_is_exported(run):
    """Somebody may have written the request in a hold; a trigger is sound with a policy alone."""
    rotate(run)
    (pin,) = holds.find_holds(run)
    holds.choose(pin, dict(pin.request) | {"triggers": [{"policy": "at_steps"}]})
    assert begin(start, run).result(60)["status"] == "published"
    (version,) = Registry(run / "exports").versions()
    assert [t["policy"] for t in version.record.triggers] == ["at_steps"]


def test_what_is_half_made_is_removed_and_what_cannot_be_read_is_not(run, caplog):
    (hold,) = holds.find_holds(run)
    half = hold.path.with_name("step_3-00000000")
    half.mkdir()
    (hold.path / "pin.json").write_text('{"step": 2')
    assert holds.find_holds(run) == []
    assert not half.exists()
    assert list(hold.path.glob("*.pt"))
    assert f"rm -r {hold.path}" in caplog.text


def test_only_the_newest_failed_steps_are_held(source, tmp_path, caplog):
    """A run whose exports all fail must not fill the disk that it trains on."""
    root = tmp_path / "run"
    settings = load_config({"output_dir": str(root / "exports"), "verify": {"load": False}})
    root.mkdir()
    actor = Exporter(settings, LocalRunner(1))
    for step in range(1, holds.MAX_KEPT + 3):
        checkpoint = Path(shutil.copytree(source, root / f"global_step_{step}"))
        (checkpoint / "actor/huggingface/config.json").unlink()
        hold = holds.make_hold(checkpoint, step, "actor")
        holds.choose(hold, request_for(hold).to_json())
        shutil.rmtree(checkpoint)
        (hold,) = (p for p in holds.find_holds(root) if p.step == step)
        assert actor.export(request_for(hold)).status == "failed"
    assert [p.step for p in holds.find_holds(root)] == [3, 4, 5]
    assert "step 1 is given up" in caplog.text


class Leaves:
    """A runner in whose process something calls `sys.exit`, once."""

    def __init__(self) -> None:
        self.left = False

    def run(self, jobs: Any, progress: Any) -> Any:
        if not self.left:
            self.left = True
            raise SystemExit("a library has had enough")
        return LocalRunner(1).run(jobs, progress)


def test_what_ends_a_process_ends_one_export_only(source, tmp_path):
    root = tmp_path / "run"
    settings = load_config({"output_dir": str(root / "exports"), "verify": {"load": False}})
    root.mkdir()
    actor, outcomes = Exporter(settings, Leaves()), []
    for step in (1, 2):
        checkpoint = Path(shutil.copytree(source, root / f"global_step_{step}"))
        hold = holds.make_hold(checkpoint, step, "actor")
        holds.choose(hold, request_for(hold).to_json())
        (hold,) = (p for p in holds.find_holds(root) if p.step == step)
        outcomes.append(actor.export(request_for(hold)))
    assert [o.status for o in outcomes] == ["failed", "published"]
    assert "a library has had enough" in outcomes[0].reason

"""Real, unmodified verl on the CPU, with the flag on. Each run proves several things; see the comments."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tests.support.runs import CHAIN, METRIC, ROOT, Run, assert_equal_weights, improvements, kill_actor, reasons

pytestmark = pytest.mark.run
BEST = f"autoexport.trigger.best={{metric:{METRIC.replace('/acc/', '/*/')},mode:max}}"
NO_ROOM = "autoexport.queue.inflight_bytes=1KB"
CONSTANT = "val-aux/num_turns/mean"


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Run:
    """FSDP2; verl holds every CPU and deletes each checkpoint at the next save; many triggers at once."""
    return Run(tmp_path_factory.mktemp("busy")).train(
        "ray_kwargs.ray_init.num_cpus=8", "trainer.max_actor_ckpt_to_keep=1",
        "trainer.save_freq=1", "trainer.test_freq=1", "trainer.total_training_steps=5",
        "autoexport.trigger.every_n_steps=2", "autoexport.trigger.at_steps=[3]", BEST,
        f"autoexport.trigger.threshold={{metric:{METRIC},above:0}}",
        "autoexport.merge.schedule_timeout_s=2", "autoexport.queue.overflow=wait", CHAIN,
    )  # fmt: skip


def test_several_triggers_make_one_version_per_step_with_all_reasons(busy):
    assert busy.code == 0, busy.log[-3000:]
    better = improvements(busy.logged(), METRIC)
    expected = {2: {"every_n_steps"}, 3: {"at_steps"}, 4: {"every_n_steps"}, 5: {"on_train_end"}}
    for step in better:
        expected.setdefault(step, set()).add("best")
    first_above = min(s for s, m in busy.logged().items() if s > 0 and m.get(METRIC, 0) > 0)
    expected.setdefault(first_above, set()).add("threshold")
    versions = busy.versions()
    assert {v["step"]: reasons(v) for v in versions} == expected
    assert [v["version"] for v in versions] == list(range(1, len(expected) + 1))
    assert [v["step"] for v in versions] == sorted(expected)
    assert busy.pointer("latest") == versions[-1]["dir"].name
    assert busy.pointer("best").endswith(f"-step{better[-1]}")


def test_every_version_equals_the_checkpoint_that_verl_has_deleted(busy):
    left = {p.parent.parent.name for p in (busy.out / "checkpoints").glob("global_step_*/actor/model_*.pt")}
    assert left == {"global_step_5"}, "verl was to delete the sources"
    assert "source=auto: live: 0.00 GB a snapshot, at most" in busy.log
    for version in busy.versions():
        assert version["source"]["kind"] == "checkpoint"  # of a step that verl has saved
        assert_equal_weights(busy, version)
        assert version["verification"]["load"]["status"] == "passed"
        assert version["verification"]["generate"]["status"] == "passed"


def test_every_version_has_the_names_and_the_config_of_the_model_it_started_from(busy):
    base = json.loads((busy.out / "assets/model/config.json").read_text())
    key = "dtype" if "dtype" in base else "torch_dtype"
    for version in busy.versions():
        assert version["verification"]["contract"]["status"] == "passed"
        assert json.loads((version["dir"] / "config.json").read_text()) == base | {key: "bfloat16"}


def test_metrics_are_those_of_the_file_logger(busy):
    logged = busy.logged()
    for version in busy.versions():
        expected = {k: v for k, v in logged[version["step"]].items() if isinstance(v, int | float)}
        assert version["metrics"] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        if "best" in reasons(version):
            assert version["measured_on"] == "these weights"


def test_no_free_cpu_is_said_and_does_not_stop_the_merge(busy):
    assert "continuing with num_cpus=0" in busy.log


def test_last_line_tells_what_was_exported(busy):
    assert re.fullmatch(
        rf"verl_autoexport: {len(busy.versions())} published \(v0001-.*\); in {re.escape(str(busy.exports))}",
        busy.last_line,
    )


def test_nothing_is_left_behind(busy):
    assert list((busy.out / "checkpoints" / ".autoexport").iterdir()) == []
    assert list((busy.exports / ".staging").iterdir()) == []


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Run:
    """FSDP1, copies that find no room, and a metric that never changes; an interval between checkpoints; a request."""
    run = Run(tmp_path_factory.mktemp("tied"))
    requests = run.exports / ".requests"
    requests.mkdir(parents=True)
    (requests / "early.json").write_text("{}")
    return run.train(
        NO_ROOM, "actor_rollout_ref.actor.strategy=fsdp", "trainer.total_training_steps=8",
        "autoexport.trigger.every_n_steps=5", f"autoexport.trigger.best={{metric:{CONSTANT}}}",
        "autoexport.trigger.on_train_end=false",
        "autoexport.queue.overflow=wait", CHAIN,
    )  # fmt: skip


def test_of_equals_the_earliest_is_best_and_a_crossed_interval_is_not_lost(tied):
    assert tied.code == 0, tied.log[-3000:]
    assert {m[CONSTANT] for m in tied.logged().values() if CONSTANT in m} == {2.0}
    assert {v["step"]: reasons(v) for v in tied.versions()} == {2: {"best", "on_request"}, 6: {"every_n_steps"}}
    assert tied.pointer("best") == "v0001-step2"
    assert list((tied.exports / ".requests").iterdir()) == []


def test_auto_falls_back_to_checkpoints_and_says_why(tied):
    assert "source=auto: checkpoint: a snapshot takes 0.00 GB of Ray's object store" in tied.log
    assert {v["source"]["kind"] for v in tied.versions()} == {"checkpoint"}


@pytest.mark.full
def test_auto_is_refused_where_neither_source_can_be(tmp_path):
    run = Run(tmp_path).train(NO_ROOM, "trainer.save_freq=-1")
    assert run.code != 0
    assert "autoexport.source=auto: the workers cannot be the source: a snapshot takes" in run.log
    assert "trainer.save_freq=-1: exports are made of verl's checkpoints and this run would write none" in run.log
    assert not (tmp_path / "metrics.jsonl").exists(), "no step was logged, not even step 0"


def test_fsdp1_equals_its_checkpoint(tied):
    for version in tied.versions():
        assert version["source"]["backend"] == "fsdp"
        assert_equal_weights(tied, version)


@pytest.mark.full
def test_resume_after_failure_after_sigkill_and_from_an_earlier_step(tmp_path):
    """One run directory through four starts."""
    run = Run(tmp_path)
    common = (
        "trainer.save_freq=1", "trainer.test_freq=1", "trainer.total_training_steps=6",
        "autoexport.trigger.every_n_steps=2", "autoexport.trigger.at_steps=[3]", BEST,
        "autoexport.queue.overflow=wait", CHAIN,
    )  # fmt: skip

    run.train(*common, raise_at=3)  # step 3 is saved, but never logged
    assert run.code != 0
    assert "the user's own callback fails on purpose" in run.log
    assert "on_train_end" not in set().union(*map(reasons, run.versions()))
    logged = {1: run.logged()}
    first = improvements(logged[1], METRIC)
    assert [v["step"] for v in run.versions()] == sorted({2, *first})
    assert "verl_autoexport:" in run.log
    assert "published" in run.log

    run.train(*common, kill_at=r"step 4 is a milestone")  # killed while step 4 is being exported
    assert run.code != 0
    before = run.versions()
    interrupted = {3, 4} - {v["step"] for v in before}  # step 3 was decided by this run, which logged it again
    assert 4 in interrupted
    assert list((run.exports / ".staging").iterdir()), "killed too late: nothing was being written"

    run.train(*common)
    assert run.code == 0, run.log[-3000:]
    for step in interrupted:
        assert f"step {step} was interrupted; exporting it now" in run.log
    third = run.versions()
    assert third[: len(before)] == before, "what was there is neither exported again nor changed"
    assert {3, 4, 6} <= {v["step"] for v in third}
    assert len({v["step"] for v in third}) == len(third)
    assert list((run.exports / ".staging").iterdir()) == []
    for version in third:
        assert_equal_weights(run, version)

    run.train(
        *common, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/checkpoints/global_step_4"
    )
    assert run.code == 0, run.log[-3000:]
    fourth = run.versions()
    old, new = fourth[: len(third)], fourth[len(third) :]
    assert old == third
    assert [v["version"] for v in fourth] == list(range(1, len(fourth) + 1))
    assert run.superseded() == {v["dir"].name for v in old if v["step"] > 4}
    assert 6 in {v["step"] for v in new}
    assert all(v["step"] > 4 for v in new)
    for version in new:
        assert_equal_weights(run, version)
    current = [v for v in fourth if v["dir"].name not in run.superseded() and "best" in reasons(v)]
    best = max(current, key=lambda v: (v["metrics"][METRIC], -v["step"]))
    assert run.pointer("best") == best["dir"].name
    assert run.pointer("latest") == new[-1]["dir"].name


@pytest.mark.full
def test_a_metric_that_no_step_logs_stops_the_run_at_the_first_validation(tmp_path):
    run = Run(tmp_path).train("autoexport.trigger.best={metric:val-core/tiny/accuracy/mean@1}")
    assert run.code != 0
    assert "val-core/tiny/accuracy/mean@1" in run.log
    assert METRIC in run.log, "near names are listed"
    assert run.versions() == []
    assert 1 not in run.logged()


@pytest.mark.full
def test_a_base_model_that_exports_could_not_match_stops_the_run_before_its_first_step(tmp_path):
    assets = ROOT / "examples/cpu_grpo/make_assets.py"
    subprocess.run([sys.executable, str(assets), str(tmp_path / "assets")], check=True)
    weights = tmp_path / "assets/model/model.safetensors"
    state = load_file(weights)
    del state["model.norm.weight"]  # transformers would train with a new one
    save_file(state, weights, {"format": "pt"})
    run = Run(tmp_path).train()
    assert run.code != 0
    assert "PlanError" in run.log
    assert "not in the base: model.norm.weight" in run.log
    assert "autoexport.weights.base_check" in run.log
    assert not (tmp_path / "metrics.jsonl").exists(), "no step was logged, not even step 0"
    assert run.versions() == []


@pytest.mark.full
def test_the_tokenizer_of_the_instruct_model_on_the_base_model(tmp_path):
    """It ends where the run's tokenizer does, not where the base's does, whichever source it is from."""
    assets = ROOT / "examples/cpu_grpo/make_assets.py"
    subprocess.run([sys.executable, str(assets), str(tmp_path / "assets")], check=True)
    base = tmp_path / "assets/model"
    instruct = AutoTokenizer.from_pretrained(base)
    assert instruct.eos_token == "<|im_end|>"
    instruct.save_pretrained(tmp_path / "instruct")
    instruct.eos_token = "<|endoftext|>"
    instruct.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        data = json.loads((base / name).read_text()) | {"eos_token_id": instruct.eos_token_id}
        (base / name).write_text(json.dumps(data))
    run = Run(tmp_path).train(
        f"actor_rollout_ref.model.tokenizer_path={tmp_path / 'instruct'}",
        "autoexport.trigger.every_n_steps=1", "trainer.total_training_steps=2", "autoexport.queue.overflow=wait",
    )  # fmt: skip
    assert run.code == 0, run.log[-3000:]
    versions = run.versions()
    assert [v["source"]["kind"] for v in versions] == ["live", "checkpoint"]
    for version in versions:
        tokenizer = AutoTokenizer.from_pretrained(version["dir"])
        assert tokenizer.eos_token == "<|im_end|>"
        assert AutoConfig.from_pretrained(version["dir"]).eos_token_id == tokenizer.eos_token_id
        generation = GenerationConfig.from_pretrained(version["dir"])
        assert generation.eos_token_id == [tokenizer.eos_token_id, instruct.eos_token_id]
        assert version["verification"]["assets"]["status"] == "passed"


@pytest.mark.full
def test_a_killed_actor_and_a_disk_that_is_full_at_the_second_milestone(tmp_path):
    """Training ends well, the report is right, and what could be exported is, though verl deleted its checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr}")

    def fill(_: int) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as f:
            while f.write(b"x" * (1 << 16)):
                pass

    try:
        run = Run(tmp_path, elsewhere=disk / "exports").train(
            "trainer.max_actor_ckpt_to_keep=1", "trainer.save_freq=1", "trainer.test_freq=-1",
            "trainer.val_before_train=False", "trainer.total_training_steps=6", "autoexport.trigger.on_save=true",
            "autoexport.queue.overflow=wait", f"autoexport.output_dir={disk}/exports", CHAIN,
            when={
                "published .*v0001-": fill,
                r"step \d failed: ": lambda _: (disk / "filler").unlink(),
                "published .*v0002-": kill_actor,
            },
        )  # fmt: skip
        assert run.code == 0, run.log[-3000:]
        assert {*range(1, 7)} <= run.logged().keys()
        published = {v["step"] for v in run.versions()}
        report = re.fullmatch(r"verl_autoexport: (\d) published \(.*\); (\d) failed \((.*)\); in .*", run.last_line)
        assert report, run.last_line
        failed = {
            int(step) for step in re.findall(r"step (\d): \w+Error: .*?(?:not enough space|No space left)", report[3])
        }
        assert (len(published), len(failed)) == (int(report[1]), int(report[2]))
        assert published | failed == {*range(1, 7)}
        assert published & failed == set()
        assert {1, 5, 6} <= published
        for version in run.versions():
            assert_equal_weights(run, version)
        held = {int(p.name.split("_")[1].split("-")[0]) for p in (run.out / "checkpoints/.autoexport").iterdir()}
        assert held == failed, "what failed for want of space is kept for the next start"
        assert list((run.exports / ".staging").iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+async_training.staleness_threshold=0.1", "verl's fully async trainer"),
        ("+autoexport.trigger.every_n_step=2", "every_n_steps"),
        ("autoexport.output_dir=s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_ray_starts(tmp_path, override, words):
    run = Run(tmp_path).train(override)
    assert run.code == 1
    assert run.last_line.startswith("verl_autoexport: ")
    assert words in run.last_line
    assert "Traceback" not in run.log
    assert "ray init kwargs" not in run.log


@pytest.mark.full
def test_the_callback_of_the_run_is_the_users_own(tmp_path):
    own = "trainer.checkpoint_callback_class=tests.support.archive_callback.Archive"
    run = Run(tmp_path).train(own, "trainer.total_training_steps=1", "trainer.save_freq=1")
    assert run.code == 0, run.log[-3000:]
    (version,) = run.versions()
    assert_equal_weights(run, version)


@pytest.mark.full
def test_switched_off_it_does_nothing_but_call_the_users_callback(tmp_path):
    run = Run(tmp_path).train(
        "autoexport.enabled=false", "trainer.total_training_steps=1", "trainer.save_freq=1", CHAIN
    )
    assert run.code == 0, run.log[-3000:]
    assert not run.exports.exists()
    assert (tmp_path / "archive" / "global_step_1").is_dir()
    assert "published" not in run.log


@pytest.mark.full
def test_training_goes_on_when_the_output_directory_is_taken_away(tmp_path):
    run = Run(tmp_path).train("autoexport.trigger.on_save=true", CHAIN, break_at=4)
    assert run.code == 0, run.log[-3000:]
    assert 4 in run.logged()
    report = re.search(r"verl_autoexport: (\d) published.*step 4: \w+Error: .*", run.log)
    assert report, "the attempt is reported with its reason"
    assert len(list(Path(f"{run.exports}.gone").glob("v*"))) == int(report[1])

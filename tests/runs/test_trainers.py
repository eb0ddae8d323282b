"""Real trainings by verl's other trainers: legacy PPO, and SFT under torchrun and on Ray."""

from __future__ import annotations

import re

import pytest

from tests.support.runs import CHAIN, METRIC, SFT, Run, assert_equal_weights, improvements, reasons

pytestmark = pytest.mark.run
BEST = f"autoexport.trigger.best={{metric:{METRIC},mode:max}}"
LOWEST = "autoexport.trigger.best={metric:val/loss,mode:min}"
LEGACY = "trainer.use_v1=False"


@pytest.fixture(scope="module")
def legacy(tmp_path_factory) -> Run:
    """The legacy trainer, stopped by its epochs before `total_training_steps`; a resume after a failure at step 3."""
    run = Run(tmp_path_factory.mktemp("legacy"))
    common = (
        LEGACY, "trainer.save_freq=1", "trainer.test_freq=1", "autoexport.trigger.every_n_steps=2", BEST, CHAIN,
        "autoexport.queue.overflow=wait",
    )  # fmt: skip
    run.train(*common, raise_at=3)
    before = run.versions()
    run.train(*common, "data.train_max_samples=40", "trainer.total_epochs=1", "trainer.total_training_steps=9")
    assert run.versions()[: len(before)] == before, "what was there is not exported again"
    return run


def test_legacy_ppo_exports_and_resumes(legacy):
    assert legacy.code == 0, legacy.log[-3000:]
    assert "the user's own callback fails on purpose" not in legacy.log
    found = {v["step"]: reasons(v) for v in legacy.versions()}
    assert {"every_n_steps"} <= found[2]
    assert {"every_n_steps"} <= found[4]


def test_legacy_ppo_whose_epochs_end_early_has_a_last_version(legacy):
    """40 rows in batches of 8: the fifth step is the last one, and nothing of it is logged again."""
    assert max(legacy.logged()) == 5
    assert "on_train_end" in reasons(legacy.versions()[-1])
    assert legacy.versions()[-1]["step"] == 5
    assert re.search(r"^verl_autoexport: \d published .*-step5\)", legacy.log, re.MULTILINE)


def test_versions_of_legacy_ppo_equal_verls_checkpoints_and_have_its_metrics(legacy):
    for version in legacy.versions():
        assert_equal_weights(legacy, version)
    logged = legacy.logged()
    for version in (v for v in legacy.versions() if v["step"] in logged and v["step"] > 3):
        expected = {k: v for k, v in logged[version["step"]].items() if isinstance(v, int | float)}
        assert version["metrics"] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Run:
    """Legacy PPO with FSDP1 whose weights come from the running workers; the archive tells what they were."""
    return Run(tmp_path_factory.mktemp("copied")).train(
        LEGACY, "actor_rollout_ref.actor.strategy=fsdp", "autoexport.source=live", "trainer.save_freq=1",
        "trainer.total_training_steps=3", "autoexport.trigger.every_n_steps=1", "autoexport.queue.overflow=wait", CHAIN,
    )  # fmt: skip


@pytest.mark.full
def test_live_versions_of_legacy_ppo_equal_verls_checkpoints(copied):
    assert copied.code == 0, copied.log[-3000:]
    assert [v["step"] for v in copied.versions()] == [1, 2, 3]
    assert {v["source"]["kind"] for v in copied.versions()} == {"live"}
    for version in copied.versions():
        assert_equal_weights(copied, version)


@pytest.fixture(scope="module", params=["torchrun", pytest.param("ray", marks=pytest.mark.full)])
def tuned(request, tmp_path_factory) -> Run:
    """SFT that is killed at step 3 of 5 and continues; it logs training and validation of a step apart."""
    run = Run(tmp_path_factory.mktemp(request.param), command=(*SFT, request.param))
    common = (
        "trainer.save_freq=1", "trainer.test_freq=2", "trainer.total_training_steps=5", LOWEST,
        "autoexport.trigger.every_n_steps=2", "autoexport.queue.overflow=wait",
    )  # fmt: skip
    run.train(*common, kill_at=r"Saving checkpoint to: .*global_step_3")
    return run.train(*common)


def test_sft_exports_and_resumes_after_a_kill(tuned):
    assert tuned.code == 0, tuned.log[-3000:]
    found = {v["step"]: reasons(v) for v in tuned.versions()}
    assert {"every_n_steps"} <= found[2]
    assert {"every_n_steps"} <= found[4]
    assert "on_train_end" in found[5]
    assert len(tuned.versions()) == len(found), "no step twice"
    assert tuned.last_line.startswith("verl_autoexport: ")
    assert "published" in tuned.last_line


def test_sft_binds_both_logs_of_a_step_to_its_weights(tuned):
    logged = tuned.logged()
    for version in (v for v in tuned.versions() if v["step"] in logged):
        assert version["metrics"] == pytest.approx(logged[version["step"]], rel=0, abs=0, nan_ok=True)
    (four,) = [v for v in tuned.versions() if v["step"] == 4]
    assert {"train/loss", "val/loss"} <= four["metrics"].keys()
    assert four["measured_on"] in (None, "these weights")
    better = improvements({s: {"-": -m["val/loss"]} for s, m in logged.items() if "val/loss" in m}, "-")
    assert better, "the loss of the validation falls"


def test_versions_of_sft_equal_verls_checkpoints(tuned):
    for version in tuned.versions():
        folder = tuned.out / "checkpoints" / f"global_step_{version['step']}"
        assert_equal_weights(tuned, version, folder)

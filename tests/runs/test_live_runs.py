"""Real verl runs with `source=live`: each version against verl's own checkpoint of the same step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.support.exports import export, tensors
from tests.support.runs import CHAIN, METRIC, Run, reasons

pytestmark = pytest.mark.run
EVERY = ("autoexport.trigger.every_n_steps=1", "actor_rollout_ref.actor.optim.lr=1e-2")
LIVE = ("autoexport.source=live", *EVERY)
REFERENCE = (
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
)
LORA = tuple(f"actor_rollout_ref.model.{key}" for key in ("lora_rank=4", "lora.rank=4", "lora.merge=True"))
FSDP1 = "actor_rollout_ref.actor.strategy=fsdp"
ASYNC = "trainer.v1.trainer_mode=colocate_async"


def beside_weights(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir() if not p.name.startswith("model")}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((*REFERENCE, ASYNC), id="fsdp2-reference-async"),
        pytest.param((FSDP1,), id="fsdp1", marks=pytest.mark.full),  # its reference model needs an accelerator
        pytest.param((FSDP1, ASYNC), id="fsdp1-async", marks=pytest.mark.full),
        pytest.param((), id="fsdp2", marks=pytest.mark.full),
        pytest.param(LORA, id="lora", marks=pytest.mark.full),
        pytest.param((*LORA, FSDP1), id="fsdp1-lora", marks=pytest.mark.full),
    ],
)
def test_equals_the_checkpoint_of_the_same_step(overrides, tmp_path):
    run = Run(tmp_path / "run").train(*LIVE, "trainer.save_freq=1", "autoexport.queue.overflow=wait", CHAIN, *overrides)
    assert run.code == 0, run.log[-3000:]
    versions = run.versions()
    assert [v["step"] for v in versions] == [1, 2, 3, 4]
    seen = []
    for version in versions:
        assert version["source"]["kind"] == "live"
        assert version["timings_s"].keys() == {"stall", "hand_over", "gather", "merge", "verify", "publish"}
        assert {version["verification"][k]["status"] for k in ("contract", "load", "generate")} == {"passed"}
        checkpoint = run.out / "archive" / f"global_step_{version['step']}"
        saved = tmp_path / version["dir"].name
        export(checkpoint, saved, base_model=str(run.out / "assets/model"))
        ours, theirs = tensors(version["dir"]), tensors(saved)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], t) and ours[k].dtype == t.dtype for k, t in theirs.items())
        assert (version["dir"] / "config.json").read_text() == (saved / "config.json").read_text()
        assert not beside_weights(version["dir"]) ^ beside_weights(saved)
        # LoRA trains nothing of the base: what it leaves as it is lies apart
        assert any(f.get("apart") for f in version["files"]) == (LORA[0] in overrides)
        seen.append(ours)
    trained = {k for k in seen[0] if LORA[0] not in overrides or k.endswith("proj.weight")}
    for a, b in pairwise(seen):
        assert {k for k in a if not torch.equal(a[k], b[k])} == trained, "every step changes every tensor of these"


@pytest.mark.full
def test_milestones_without_any_checkpoint(tmp_path):
    run = Run(tmp_path).train(
        *EVERY, "trainer.save_freq=-1", "trainer.total_training_steps=10",
        f"autoexport.trigger.best={{metric:{METRIC}}}",
    )  # fmt: skip
    assert run.code == 0, run.log[-3000:]
    assert not list((tmp_path / "checkpoints").glob("global_step_*"))
    assert "source=auto: live: " in run.log
    versions = run.versions()
    assert {v["source"]["kind"] for v in versions} == {"live"}
    dropped = run.last_line.count("coalesced into")
    assert len(versions) + dropped == 10
    assert versions[-1]["step"] == 10
    assert reasons(versions[-1]) >= {"every_n_steps", "on_train_end"}
    logged = {s: m[METRIC] for s, m in run.logged().items() if s and METRIC in m}
    best = max(logged, key=lambda s: (logged[s], -s))
    assert run.pointer("best").endswith(f"-step{best}")
    assert list((run.exports / ".staging").iterdir()) == []
    assert "spill" not in run.log.lower()

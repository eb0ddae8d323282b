"""Real verl runs that train LoRA: the fused model and the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.exports import auto, tensors
from tests.support.runs import Run

pytestmark = pytest.mark.run


@pytest.mark.full
def test_real_run_exports_both(tmp_path):
    model = "actor_rollout_ref.model"
    run = Run(tmp_path).train(
        f"{model}.lora_rank=4", f"{model}.lora.rank=4", f"{model}.lora.merge=True", "autoexport.weights.lora=both",
    )  # fmt: skip
    assert run.code == 0, run.log[-3000:]
    (version,) = run.versions()
    assert {k: v["status"] for k, v in version["verification"].items() if k != "contract"} == dict.fromkeys(
        ("structure", "assets", "load", "generate", "logits", "adapter"), "passed"
    )
    base = tmp_path / "assets/model"
    config = json.loads((version["dir"] / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 16, str(base))
    merged = joined_model(tmp_path / "checkpoints/global_step_4/actor", base).merge_and_unload()
    assert_equal(tensors(version["dir"]), merged.to(torch.bfloat16).state_dict())
    adapted = PeftModel.from_pretrained(auto(base).to(torch.bfloat16), version["dir"] / "adapter")
    ids = torch.arange(8)[None]
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=0.1, rtol=0.1)


def joined_model(actor: Path, base: Path) -> PeftModel:
    """verl's own model, its shards joined by plain concatenation."""
    files = sorted(actor.glob("model_world_size_*.pt"), key=lambda p: int(p.stem.rpartition("_")[2]))
    ranks = [torch.load(f, weights_only=False, map_location="cpu") for f in files]
    joined = {k: torch.cat([r[k].to_local() for r in ranks]) for k in ranks[0]}
    meta = json.loads((actor / "lora_train_meta.json").read_text())
    model = get_peft_model(auto(base).float(), LoraConfig(**meta, target_modules="all-linear"))
    model.load_state_dict(joined)
    return model


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() <= expected.keys()
    assert expected.keys() - found.keys() <= {"lm_head.weight"}  # tied
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name

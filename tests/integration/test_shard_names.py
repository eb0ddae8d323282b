"""Shards whose names are those of transformers 4: saved by wheels of that time, or made here with such names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import NORM, STEP, edit
from tests.support.exports import assert_same_model, export, oracle, tensors
from tests.support.families import config as family
from tests.support.repository import DATA
from tests.support.sharding import build
from verl_autoexport.errors import PlanError, VerifyError
from verl_autoexport.model.model_class import load_config
from verl_autoexport.verify.against_shards import compare
from verl_autoexport.verify.checks import Source, check_loading

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("name", ["verl-0.4.1-critic", "verl-0.4.1-lora"])
def test_checkpoints_of_old_wheels(name, tmp_path):
    """verl 0.4.1, torch 2.6.0, transformers 4.51.3, beside what transformers saved of the unsharded model."""
    record = export(DATA / name / "global_step_1", tmp_path / "out", verify=True)
    assert {check["status"] for check in record.verification.values()} <= {"passed", "skipped"}
    assert re.match(r"all \d+ tensors equal those of the shards", record.verification["logits"]["detail"])
    found, expected = tensors(tmp_path / "out"), load_file(DATA / name / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor.to(found[key].dtype)) for key, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_one_by_one(dtype, checkpoint, tmp_path):
    record = export(checkpoint("unpacked"), tmp_path / "out", dtype=dtype, verify=True)
    assert_same_model(tmp_path / "out", oracle(checkpoint("unpacked") / "reference", dtype, tmp_path / "oracle"))
    assert record.verification["logits"]["status"] == "passed"


RENAMED: dict[str, tuple[str, Callable[[str], str]]] = {
    "4.51": ("qwen2_5_vl", lambda name: re.sub(r"^model\.(language_model\.|(?=visual))", r"model.", name)),
    "4.57": ("gemma3", lambda name: name.replace("vision_tower.", "vision_tower.vision_model.")),
}
"""Version of transformers → a family, and the name that it had there for a tensor."""


@pytest.mark.parametrize("version", RENAMED)
def test_other_prefixes(version, tmp_path):
    name, old = RENAMED[version]
    model = build(family(name), "float32")
    state = {old(key): tensor for key, tensor in model.state_dict().items()}
    assert not model.state_dict().keys() >= state.keys()
    actor = tmp_path / f"global_step_{STEP}" / "actor"
    model.save_pretrained(tmp_path / "reference")
    model.config.save_pretrained(actor / "huggingface")
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    export(actor, tmp_path / "out", dtype="float32")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "reference")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    exported = type(model).from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert compare(exported, actor, load_config(actor / "huggingface")).startswith(f"all {len(state)} tensors equal")


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda shards: shards.pop(EXPERT),
    "double": lambda shards: shards.update({NORM.removeprefix("model."): shards[NORM]}),
    "another dtype": lambda shards: shards.update({EXPERT: torch.ones(25, 32, dtype=torch.bfloat16)}),
    "another shape": lambda shards: shards.update({EXPERT: torch.ones(3, 5)}),
    "unknown": lambda shards: shards.update({EXPERT.replace("up_proj", "side_proj"): shards[EXPERT]}),
}


@pytest.mark.parametrize("case", BAD)
def test_names_that_do_not_make_the_model_are_refused(case, own_checkpoint, tmp_path):
    made = edit(own_checkpoint("unpacked"), BAD[case])
    with pytest.raises(PlanError, match=r"not a complete Qwen3MoeForCausalLM: missing .*unexpected"):
        export(made, tmp_path / "out")


@pytest.mark.parametrize("name", [EXPERT, NORM])
def test_a_changed_value_is_named(name, own_checkpoint, tmp_path):
    made = own_checkpoint("unpacked")
    export(made, tmp_path / "out", dtype="float32")
    edit(made, lambda shards: getattr(shards[name], "_local_tensor", shards[name]).add_(1))
    source = Source(made / "actor", made / "actor/huggingface")
    with pytest.raises(VerifyError, match=r"logits failed: .*1 tensors differ from the shards"):
        check_loading(tmp_path / "out", 10**6, source=source)

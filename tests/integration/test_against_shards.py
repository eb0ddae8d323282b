"""The loaded model against its shards by another path: equal ones pass, and whatever is wrong is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.exports import export
from verl_autoexport.errors import VerifyError
from verl_autoexport.model.model_class import load_config
from verl_autoexport.verify.against_shards import compare
from verl_autoexport.verify.checks import Source, check_loading


def load(directory: Path) -> torch.nn.Module:
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(directory, dtype="auto").eval()


def against(model: Any, shards: Path) -> str:
    """`compare` with the configuration that lies beside the shards."""
    return compare(model, shards, load_config(shards / "huggingface"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["even", "tied", "fsdp1", "moe", "bf16", "inner", "uneven", "hsdp", "grid"])
def test_right_models_pass(name, dtype, checkpoint, tmp_path):
    export(checkpoint(name), tmp_path / "out", dtype=dtype)
    found = against(load(tmp_path / "out"), checkpoint(name) / "actor")
    assert re.fullmatch(r"all \d+ tensors equal those of the shards, and so do the logits on 8 tokens", found)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_changed_value_is_named(name, checkpoint, tmp_path):
    export(checkpoint("uneven"), tmp_path / "out", dtype="float32")
    model = load(tmp_path / "out")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-6
    with pytest.raises(ValueError, match=f"1 tensors differ from the shards: .*{name}"):
        against(model, checkpoint("uneven") / "actor")


def test_a_model_that_does_not_run_here_is_compared_all_the_same(checkpoint, tmp_path):
    export(checkpoint("even"), tmp_path / "out")
    model = load(tmp_path / "out")
    model.forward = lambda **kwargs: kwargs["pixel_values"]
    assert "no logits, since the model does not run" in against(model, checkpoint("even") / "actor")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    with pytest.raises(ValueError, match=r"1 tensors differ"):
        against(model, checkpoint("even") / "actor")


def test_swapped_experts_are_named(checkpoint, tmp_path):
    """Names, shapes and sums are all right then."""
    export(checkpoint("moe"), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    values = load_file(file)
    a, b = (f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in (1, 2))
    save_file(values | {a: values[b], b: values[a]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors differ .*layers.0.mlp.experts.gate_up_proj"):
        against(load(tmp_path / "out"), checkpoint("moe") / "actor")


def test_a_tensor_that_the_shards_lack_is_named(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    export(made, tmp_path / "out")
    for path in (made / "actor").glob("*.pt"):
        state = torch.load(path, weights_only=False)
        del state["model.norm.weight"]
        torch.save(state, path)
    with pytest.raises(ValueError, match=r"not in the shards: \['model.norm.weight'\]"):
        against(load(tmp_path / "out"), made / "actor")


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.1), ("rope_theta", 7.0), ("hidden_act", "relu")])
def test_a_config_of_another_model_fails_the_check(key, value, checkpoint, tmp_path):
    export(checkpoint("even"), tmp_path / "out")
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    where = config["rope_parameters"] if key == "rope_theta" else config
    where[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=f"logits failed: .*{'rope_parameters' if key == 'rope_theta' else key}"):
        check_loading(
            tmp_path / "out",
            10**6,
            source=Source(checkpoint("even") / "actor", checkpoint("even") / "actor/huggingface"),
        )


def test_a_truncated_shard_fails_the_check(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    export(made, tmp_path / "out")
    path = next((made / "actor").glob("*.pt"))
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(VerifyError, match=r"logits failed|exited with"):
        check_loading(tmp_path / "out", 10**6, source=Source(made / "actor", made / "actor/huggingface"))

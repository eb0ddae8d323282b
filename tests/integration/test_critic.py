"""Value models: verl's critic holds a token classifier, and a config.json that says something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.exports import assert_same_model, export, oracle
from tests.support.sharding import QWEN2, QWEN3_MOE, build, make_checkpoints
from verl_autoexport.errors import PlanError
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.model.planner import plan_model
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles
from verl_autoexport.verify.directory import check_directory

# What verl 0.9.1 sets on the configuration before it builds the value model.
VERL = {"num_labels": 1, "classifier_dropout": 0.0, "hidden_dropout": "0", "summary_dropout_prob": 0.0}
AS_SAVED = {"architectures": ["Qwen2ForCausalLM"]}
VALUE = QWEN2 | VERL | {"architectures": ["Qwen2ForTokenClassification"]}
MOE = QWEN3_MOE | VERL | {"architectures": ["Qwen3MoeForTokenClassification"]}
CASES = {
    "qwen2": {"config": VALUE, "saved": AS_SAVED},
    "tied": {"config": VALUE | {"tie_word_embeddings": True}, "saved": AS_SAVED},
    "fsdp1": {"config": VALUE, "saved": AS_SAVED, "strategy": "fsdp"},
    "moe": {"config": MOE, "saved": {"architectures": ["Qwen3MoeForCausalLM"]}},
    "three": {"config": VALUE | {"num_labels": 3}, "saved": AS_SAVED | {"id2label": None, "label2id": None}},
    "sequence": {"config": VALUE | {"architectures": ["Qwen2ForSequenceClassification"]}, "saved": AS_SAVED},
}


@pytest.fixture(scope="module")
def critics(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in `CASES` → a `global_step_3` with `critic/` and the unsharded `reference/`."""
    folder = tmp_path_factory.mktemp("critics")
    make_checkpoints({folder / name / "global_step_3": case | {"role": "critic"} for name, case in CASES.items()}, 2)
    return lambda name: folder / name / "global_step_3"


@pytest.mark.parametrize("dtype", ["bfloat16", "source"])
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, dtype, critics, tmp_path):
    made = critics(name)
    record = export(made / "critic", tmp_path / "ours", dtype=dtype)
    theirs = oracle(made / "reference", dtype, tmp_path / "theirs")
    (architecture,) = CASES[name]["config"]["architectures"]
    assert record.architectures == (architecture,)
    assert_same_model(tmp_path / "ours", theirs)


@pytest.mark.parametrize("name", ["tied", "moe"])
def test_reload_reports_nothing(name, critics, tmp_path):
    record = export(critics(name) / "critic", tmp_path / "out", verify=True)
    assert record.verification["load"]["status"] == "passed"
    assert record.verification["generate"]["detail"].endswith("does not generate; forward pass finite")
    model, report = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.num_labels == model.score.out_features == 1
    assert {k: v.status for k, v in check_directory(tmp_path / "out", load=False).items()} == {
        "hashes": "passed", "structure": "passed", "load": "skipped", "generate": "skipped",
    }  # fmt: skip


@pytest.mark.parametrize("with_head", [True, False])
def test_with_the_model_it_started_from(with_head, critics, tmp_path):
    """The base is a language model: its head is replaced, its config says so, and nothing else."""
    base = tmp_path / "base"
    build(QWEN2 | {"tie_word_embeddings": not with_head}, "bfloat16").save_pretrained(base)
    record = export(critics("qwen2" if with_head else "tied") / "critic", tmp_path / "out", base_model=str(base))
    explained = {"head of Qwen2ForTokenClassification": ["score.bias", "score.weight"]}
    if with_head:
        explained["replaced by the head of Qwen2ForTokenClassification"] = ["lm_head.weight"]
    assert record.verification["contract"]["status"] == "passed"
    assert record.verification["contract"]["explained"] == explained
    expected = json.loads((base / "config.json").read_text()) | {
        "architectures": ["Qwen2ForTokenClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    assert json.loads((tmp_path / "out/config.json").read_text()) == expected
    assert not (tmp_path / "out/generation_config.json").exists()
    _, report = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


def refused(made: Path, change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> str:
    """The message for the shards of `made` once `change` has been made to them, as one rank's file."""
    state = load_file(made / "reference/model.safetensors")
    change(state)
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic/huggingface").symlink_to(made / "critic/huggingface")
    torch.save(state, tmp_path / "critic/model_world_size_1_rank_0.pt")
    spec = checkpoint_spec(tmp_path / "critic")
    with pytest.raises(PlanError) as caught:
        plan_model(spec.options, spec.checkpoint, spec.saved, FsdpFiles(spec.checkpoint).manifest())
    return str(caught.value)


def test_two_heads_are_ambiguous(critics, tmp_path):
    embeddings = "model.embed_tokens.weight"
    message = refused(critics("qwen2"), lambda s: s.update({"lm_head.weight": s[embeddings]}), tmp_path)
    assert "score.weight" in message
    assert "lm_head.weight" in message
    assert "cannot be told" in message


def test_value_head_of_trl_is_refused(critics, tmp_path):
    def change(state):
        for part in ("weight", "bias"):
            state[f"v_head.summary.{part}"] = state.pop(f"score.{part}")

    message = refused(critics("qwen2"), change, tmp_path)
    assert "v_head.summary.weight" in message
    assert "AutoModelForCausalLMWithValueHead" in message


def test_incomplete_value_model_is_named_as_one(critics, tmp_path):
    message = refused(critics("qwen2"), lambda s: s.pop("model.norm.weight"), tmp_path)
    assert "not a complete Qwen2ForTokenClassification: missing model.norm.weight; unexpected none" in message


def test_unknown_head_is_refused(critics, tmp_path):
    message = refused(critics("qwen2"), lambda s: s.update({"value.weight": s.pop("score.weight")}), tmp_path)
    assert "not a complete Qwen2ForCausalLM" in message
    assert "unexpected score.bias, value.weight" in message


def test_reward_model_as_start(critics, tmp_path):
    """A sequence classifier that verl made into a token classifier: only the bias is new."""
    base = tmp_path / "base"
    build(VALUE | {"architectures": ["Qwen2ForSequenceClassification"]}, "float32").save_pretrained(base)
    state = load_file(base / "model.safetensors")
    state["score.bias"] = torch.ones(1)
    made = tmp_path / "critic"
    (made / "huggingface").mkdir(parents=True)
    (made / "huggingface/config.json").write_text((base / "config.json").read_text())
    torch.save(state, made / "model_world_size_1_rank_0.pt")
    record = export(made, tmp_path / "out", base_model=str(base), dtype="base", verify=True)
    assert record.architectures == ("Qwen2ForTokenClassification",)
    assert record.verification["contract"]["explained"] == {"head of Qwen2ForTokenClassification": ["score.bias"]}
    save_file(state, tmp_path / "expected.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], v) for k, v in state.items())

"""What a run's configuration says and its weights deny is decided before anything is written, loaded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.published import SMALL, make_base, make_run, make_tokenizer, read_json, saved, write_json
from verl_autoexport import export_checkpoint
from verl_autoexport.errors import PlanError

QUANTIZED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_base(tmp_path_factory.mktemp("published") / "base"))


@pytest.fixture
def run(base, tmp_path) -> Path:
    return make_run(tmp_path / "run", base)


def edit(run: Path, **values: Any) -> None:
    write_json(saved(run) / "config.json", read_json(saved(run) / "config.json") | values)


def edit_shards(run: Path, change: Any) -> None:
    path = run / "actor/model_world_size_1_rank_0.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantization_of_weights_that_are_plain_is_left_out(key, verify, base, run, tmp_path):
    edit(run, **{key: QUANTIZED})
    record = export_checkpoint(run, tmp_path / "out", base_model=str(base), verify=verify)
    assert key not in read_json(tmp_path / "out/config.json")
    assert any(f"{key} is left out" in note and "float32" in note for note in record.notes)
    assert read_json(saved(run) / "config.json")[key] == QUANTIZED, "the checkpoint is not ours to change"


def test_no_link_is_written_through(base, run, tmp_path):
    config, kept = saved(run) / "config.json", run / "actor/kept.json"
    write_json(kept, read_json(config) | {"quantization_config": QUANTIZED})
    config.unlink()
    config.symlink_to("../kept.json")
    export_checkpoint(run, tmp_path / "out", base_model=str(base), verify=False)
    assert "quantization_config" in read_json(kept)
    assert "quantization_config" not in read_json(tmp_path / "out/config.json")


def test_quantized_weights_are_refused_with_advice(run, tmp_path):
    edit(run, quantization_config=QUANTIZED)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_shards(run, lambda s: s.update({name: s[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(PlanError, match=rf"quantization_config, and {name} is float8_e4m3fn: .*dequantized"):
        export_checkpoint(run, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
CONTRADICTIONS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "tied, but the values differ": ({"tie_word_embeddings": True}, None, "are tied according to config.json, but"),
    "untied, but there is no head": ({}, lambda s: s.pop(HEAD), "tie_word_embeddings is false, .*trained tied"),
    "vocabulary": ({"vocab_size": 280}, None, "vocab_size is 280, they hold 272 rows"),
    "labels": (
        {"architectures": ["Qwen2ForTokenClassification"], "num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}},
        lambda s: (s.pop(HEAD), s.update({"score.weight": torch.randn(1, 32), "score.bias": torch.randn(1)})),
        "num_labels is 3, they hold 1 rows",
    ),
    "no architecture": ({"architectures": []}, None, "`architectures` is missing"),
    "an unknown architecture": ({"architectures": ["NoSuchModel"]}, None, "architecture NoSuchModel is unknown"),
    "an architecture of another kind": (
        {"architectures": ["WhisperForConditionalGeneration"]}, None, "whose model_type is 'whisper', but",
    ),
    "code that is not there": (
        {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, None,
        "auto_map leads to modeling_own.Own, which is not beside it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_refused_with_the_key_before_anything_is_written(case, run, tmp_path):
    values, change, message = CONTRADICTIONS[case]
    edit(run, **values)
    if change:
        edit_shards(run, change)
    with pytest.raises(PlanError, match=message):
        export_checkpoint(run, tmp_path / "out", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_architecture_of_another_model_type_is_set_right(base, run, tmp_path):
    """Transformers loads by `model_type`, engines by `architectures`."""
    edit(run, architectures=["MistralForCausalLM"])
    record = export_checkpoint(run, tmp_path / "out", base_model=str(base))
    assert record.architectures == ("Qwen2ForCausalLM",)
    assert read_json(tmp_path / "out/config.json")["architectures"] == ["Qwen2ForCausalLM"]
    assert any("Qwen2ForCausalLM instead of MistralForCausalLM" in note for note in record.notes)
    assert record.verification["logits"]["status"] == "passed"


def test_code_that_transformers_has_itself_is_left_out(base, run, tmp_path):
    edit(run, auto_map={"AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM"})
    record = export_checkpoint(run, tmp_path / "out", base_model=str(base))
    assert "auto_map" not in read_json(tmp_path / "out/config.json")
    assert any("auto_map is left out" in note for note in record.notes)
    assert record.verification["logits"]["status"] == "passed"


def test_yarn_reaches_readers_of_the_old_style(base, tmp_path):
    from transformers import AutoConfig

    longer = tmp_path / "longer"
    longer.mkdir()
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    write_json(longer / "config.json", read_json(base / "config.json") | {"rope_scaling": scaling})
    config = AutoConfig.from_pretrained(longer)
    record = export_checkpoint(make_run(tmp_path / "run", base, config=config), tmp_path / "out", base_model=str(base))
    assert record.verification["logits"]["status"] == "passed"
    written = read_json(tmp_path / "out/config.json")
    assert written == read_json(base / "config.json") | {"rope_scaling": scaling}


def test_what_no_base_costs_is_noted(run, tmp_path):
    record = export_checkpoint(run, tmp_path / "out", base_model="nobody/nothing")
    assert any("not compared with the base model" in note for note in record.notes)
    assert SMALL["vocab_size"] == read_json(tmp_path / "out/config.json")["vocab_size"]

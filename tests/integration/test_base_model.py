"""Exports against the base model that a run starts from: names, layout, dtypes and files are the base's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.bases import config_of, contract, edit_config, edit_tensors, make_base
from tests.support.checkpoints import EMBED, HEAD, NORM, STEP
from tests.support.exports import assert_same_model, export, oracle, tensors
from tests.support.families import WRITTEN
from tests.support.sharding import QWEN2, QWEN3_MOE, make_checkpoints
from verl_autoexport.errors import ConfigError, MergeError, PlanError
from verl_autoexport.model.base_compatibility import check_start
from verl_autoexport.model.base_model import find_base
from verl_autoexport.verify.directory import check_directory

OLD_STYLE = {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "transformers_version": "4.43.1", "use_cache": False}
VL_MOE = WRITTEN["qwen3_vl_moe"]


@pytest.fixture(scope="module")
def vl_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vl_moe") / f"global_step_{STEP}"
    make_checkpoints({path: {"config": VL_MOE}}, 2)
    return path


# -- the comparison -------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize(("name", "config"), [("uneven", QWEN2), ("moe", QWEN3_MOE)])
def test_same_as_the_base(name, config, shard_size, checkpoint, tmp_path):
    base = make_base(tmp_path / "base", config, max_shard_size=shard_size)
    assert (base / "model.safetensors").exists() is (shard_size == "5GB")
    made = checkpoint(name)
    record = export(made, tmp_path / "ours", base_model=str(base))
    assert contract(record).keys() == {"status", "detail"}
    assert contract(record)["status"] == "passed"
    assert str(base) in contract(record)["detail"]
    assert_same_model(tmp_path / "ours", oracle(made / "reference", "bfloat16", tmp_path / "theirs"))


DAMAGE = {
    f"not in the base: {NORM}": lambda s: s.pop(NORM),
    f"not in the base: {HEAD}": lambda s: s.pop(HEAD),
    f"of another shape: {NORM} (base [24], here [48])": lambda s: s.update({NORM: s[NORM][:24]}),
    f"of another shape: {EMBED} (base [130, 48], here [131, 48])": lambda s: s.update({EMBED: s[EMBED][:130]}),
    "of another shape: model.layers.0.mlp.up_proj.weight (base [48, 100], here [100, 48])": lambda s: s.update(
        {"model.layers.0.mlp.up_proj.weight": s["model.layers.0.mlp.up_proj.weight"].T}
    ),
    "missing: model.layers.0.mlp.w1.weight; not in the base: model.layers.0.mlp.up_proj.weight": lambda s: s.update(
        {"model.layers.0.mlp.w1.weight": s.pop("model.layers.0.mlp.up_proj.weight")}
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_differences_are_refused_before_anything_is_written(message, checkpoint, tmp_path):
    base = edit_tensors(make_base(tmp_path / "base"), DAMAGE[message])
    with pytest.raises(PlanError) as caught:
        export(checkpoint("uneven"), tmp_path / "out", base_model=str(base))
    assert message in str(caught.value)
    assert str(base) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    with pytest.raises(PlanError) as caught:
        check_start(str(base), "bfloat16", False, None)
    assert message.partition(" (")[0] in str(caught.value)


def test_another_size_is_refused(checkpoint, tmp_path):
    base = make_base(tmp_path / "base", QWEN2 | {"num_hidden_layers": 3})
    with pytest.raises(PlanError, match=r"missing: model\.layers\.2\.input_layernorm\.weight, .*\(12 in all\)"):
        export(checkpoint("uneven"), tmp_path / "out", base_model=str(base))
    check_start(str(base), "bfloat16", False, None)


def test_a_resized_vocabulary_is_explained(checkpoint, tmp_path):
    base = make_base(tmp_path / "base", QWEN2 | {"vocab_size": 200})
    record = export(checkpoint("uneven"), tmp_path / "out", base_model=str(base))
    assert contract(record)["explained"] == {"vocabulary resized from 200 to 131": [HEAD, EMBED]}
    assert config_of(tmp_path / "out") == config_of(base) | {"vocab_size": 131}


def test_a_tied_head_that_the_base_holds_too_is_explained(checkpoint, tmp_path):
    base = make_base(tmp_path / "base", QWEN2 | {"tie_word_embeddings": True})
    edit_tensors(base, lambda s: s.update({HEAD: s[EMBED].clone()}))
    record = export(checkpoint("tied"), tmp_path / "out", base_model=str(base))
    assert contract(record)["explained"] == {"tied, written once": [HEAD]}
    assert HEAD not in tensors(tmp_path / "out")
    assert "explained" in check_start(str(base), "bfloat16", False, None).to_check()


def test_a_head_untied_by_the_run_is_explained(checkpoint, tmp_path):
    base = make_base(tmp_path / "base", QWEN2 | {"tie_word_embeddings": True})
    record = export(checkpoint("uneven"), tmp_path / "out", base_model=str(base))
    assert contract(record)["explained"] == {"untied from the embeddings": [HEAD]}
    assert config_of(tmp_path / "out") == config_of(base) | {"tie_word_embeddings": False}


def test_what_the_class_never_reads_is_explained(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = edit_tensors(make_base(tmp_path / "base"), lambda s: s.update({name: torch.ones(6)}))
    record = export(checkpoint("uneven"), tmp_path / "out", base_model=str(base))
    assert contract(record)["explained"] == {"no part of Qwen2ForCausalLM": [name]}


@pytest.mark.parametrize("dtype", ["bfloat16", "base"])
def test_the_layout_of_the_base_wins(dtype, vl_moe, tmp_path):
    """Qwen3-VL-MoE: the hub has packed experts the other way round than transformers writes them."""

    def swap(state):
        for name in [k for k in state if k.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
            state[name] = state[name].transpose(1, 2)

    base = edit_tensors(make_base(tmp_path / "base", VL_MOE), swap)
    assert "transposed" in check_start(str(base), dtype, False, None).to_check()
    record = export(vl_moe, tmp_path / "out", base_model=str(base), dtype=dtype, verify=True)
    assert len(contract(record)["transposed"]) == 4
    assert record.verification["load"]["status"] == "passed"
    assert {v.status for v in check_directory(tmp_path / "out", load=False).values()} == {"passed", "skipped"}
    theirs = tensors(oracle(vl_moe / "reference", "bfloat16", tmp_path / "theirs"))
    swap(theirs)
    ours = tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys() == tensors(base).keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    cls = transformers.Qwen3VLMoeForConditionalGeneration
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        logits = [cls.from_pretrained(tmp_path / d, dtype="float32")(input_ids=ids).logits for d in ("out", "theirs")]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda base: shutil.rmtree(base), "is no local directory"),
        (lambda base: (base / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda base: (base / "config.json").unlink(), "has no config.json"),
        (lambda base: edit_config(base, quantization_config={"quant_method": "fp8"}), "is quantized"),
    ],
)
def test_no_base_at_hand_is_told(prepare, reason, checkpoint, tmp_path):
    prepare(make_base(tmp_path / "base"))
    record = export(checkpoint("uneven"), tmp_path / "out", base_model=str(tmp_path / "base"))
    assert contract(record)["status"] == "skipped"
    assert reason in contract(record)["detail"]
    assert check_start(str(tmp_path / "base"), "bfloat16", False, None).to_check()["status"] == "skipped"
    with pytest.raises(ConfigError, match=reason):
        export(checkpoint("uneven"), tmp_path / "none", base_model=str(tmp_path / "base"), dtype="base")
    with pytest.raises(ConfigError, match=reason):
        check_start(str(tmp_path / "base"), "base", False, None)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_base_is_refused(content, tmp_path):
    base = make_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(PlanError, match=r"base is damaged: .*model\.safetensors|base is damaged: .*no tensors"):
        find_base(str(base))


# -- dtype ----------------------------------------------------------------------------------


def test_each_tensor_in_the_dtype_of_the_base(checkpoint, tmp_path):
    def mix(state):
        for name in state:
            state[name] = state[name].to(torch.float32 if "layernorm" in name else torch.float16)

    base = edit_tensors(make_base(tmp_path / "base"), mix)
    config = edit_config(base, dtype="float16")
    made = checkpoint("uneven")
    record = export(made, tmp_path / "out", dtype="base", base_model=str(base), verify=True)
    assert record.dtype == "base"
    assert record.verification["load"]["status"] == "passed"
    theirs, ours, source = tensors(base), tensors(tmp_path / "out"), tensors(made / "reference")
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert all(torch.equal(v, source[k].to(v.dtype)) for k, v in ours.items())
    assert config_of(tmp_path / "out") == config


def test_each_expert_in_the_dtype_of_the_base(checkpoint, tmp_path):
    def mix(state):
        for name in state:
            if ".experts.2." in name:
                state[name] = state[name].to(torch.float32)

    base = edit_tensors(make_base(tmp_path / "base", QWEN3_MOE), mix)
    export(checkpoint("moe"), tmp_path / "out", dtype="base", base_model=str(base))
    theirs, ours, source = tensors(base), tensors(tmp_path / "out"), tensors(checkpoint("moe") / "reference")
    assert {v.dtype for v in ours.values()} == {torch.float32, torch.bfloat16}
    assert all(ours[k].dtype == v.dtype and torch.equal(ours[k], source[k].to(v.dtype)) for k, v in theirs.items())


def test_overflow_in_the_dtype_of_the_base_names_the_tensor(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    path = made / "actor/model_world_size_2_rank_1.pt"
    shards = torch.load(path, weights_only=False)
    shards[HEAD].to_local().view(-1)[3] = 1e6
    torch.save(shards, path)
    base = make_base(tmp_path / "base", QWEN2 | {"vocab_size": 128}, "float16")
    with pytest.raises(MergeError, match=r"lm_head\.weight: .* float32 → float16 overflowed"):
        export(made, tmp_path / "out", dtype="base", base_model=str(base))


# -- config.json and the files beside it ------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "source", "base"])
def test_config_of_the_base_in_its_own_style(dtype, checkpoint, tmp_path):
    base = make_base(tmp_path / "base")
    config = edit_config(base, ("dtype", "rope_parameters", "layer_types"), **OLD_STYLE)
    record = export(checkpoint("uneven"), tmp_path / "out", dtype=dtype, base_model=str(base))
    expected = {"source": "float32", "base": "bfloat16"}.get(dtype, dtype)
    assert config_of(tmp_path / "out") == config | {"torch_dtype": expected}
    assert list(config_of(tmp_path / "out")) == list(config)
    assert not any("config.json" in note for note in record.notes)


def test_nested_dtypes_as_the_base_spells_them(vl_moe, tmp_path):
    base = make_base(tmp_path / "base", VL_MOE)
    config = config_of(base)
    for node, key in ((config, "torch_dtype"), (config["text_config"], "torch_dtype"), (config["vision_config"], "")):
        node.pop("dtype", None)
        if key:
            node[key] = "bfloat16"
    (base / "config.json").write_text(json.dumps(config))
    export(vl_moe, tmp_path / "out", dtype="float16", base_model=str(base))
    config["torch_dtype"] = config["text_config"]["torch_dtype"] = "float16"
    assert config_of(tmp_path / "out") == config


def test_what_the_run_overrode_is_in_the_config(own_checkpoint, tmp_path):
    base = make_base(tmp_path / "base", QWEN2 | {"vocab_size": 128})
    config = edit_config(base, ("dtype", "rope_parameters", "layer_types"), **OLD_STYLE)
    made = own_checkpoint("even")
    edit_config(made / "actor/huggingface", max_position_embeddings=64, pad_token_id=5)
    export(made, tmp_path / "out", base_model=str(base))
    assert config_of(tmp_path / "out") == config | {"max_position_embeddings": 64}


def test_a_config_that_the_bases_file_cannot_say_is_written_anew(own_checkpoint, tmp_path):
    """`rope_theta` of the old style and `rope_parameters` of the new one contradict each other."""
    base = make_base(tmp_path / "base", QWEN2 | {"vocab_size": 128})
    edit_config(base, ("dtype", "layer_types", "rope_parameters"), **OLD_STYLE)
    made = own_checkpoint("even")
    edit_config(made / "actor/huggingface", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    export(made, tmp_path / "out", base_model=str(base))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 5e5

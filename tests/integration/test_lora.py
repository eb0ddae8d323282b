"""LoRA checkpoints of real PEFT models, sharded by real FSDP, against PEFT's own merging and saving."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import CHECKED, STEP
from tests.support.exports import assert_same_model, auto, export, oracle, tensors
from tests.support.sharding import QWEN2, QWEN3_MOE, make_checkpoints
from verl_autoexport.cli.main import main
from verl_autoexport.errors import AutoExportError, MergeError, PlanError
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.model.model_class import load_config
from verl_autoexport.model.planner import plan_model
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles
from verl_autoexport.sources.holds import link_files
from verl_autoexport.verify.against_shards import compare
from verl_autoexport.verify.directory import check_directory

LINEAR = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}
DORA = LINEAR | {"use_dora": True}
PATTERNS = {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 8}, "alpha_pattern": {"v_proj": 3}}
SOME = LINEAR | {"target_modules": ["q_proj", "v_proj"]}
TIED = QWEN2 | {"tie_word_embeddings": True}
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 131, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_positions": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {"config": QWEN2, "lora": LINEAR},
    "fsdp1": {"config": QWEN2, "lora": LINEAR, "strategy": "fsdp"},
    "placed": {"config": QWEN2, "lora": LINEAR, "strategy": "placed"},
    "bf16": {"config": QWEN2, "lora": LINEAR, "dtype": "bfloat16"},
    "tied": {"config": TIED, "lora": LINEAR},
    "some": {"config": QWEN2, "lora": SOME},
    "path": {"config": QWEN2, "lora": LINEAR | {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"}},
    "moe": {"config": QWEN3_MOE, "lora": SOME},
    "saved": {"config": QWEN2, "lora": SOME | {"modules_to_save": ["lm_head", "model.norm"]}},
    "embedding": {"config": QWEN2, "lora": SOME | {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}},
    "bias": {"config": QWEN2, "lora": SOME | {"lora_bias": True}},
    "dora": {"config": QWEN2, "lora": DORA},
    "dora_bf16": {"config": QWEN2, "lora": DORA, "dtype": "bfloat16"},
    "dora_embedding": {"config": QWEN2, "lora": DORA | {"target_modules": ["embed_tokens", "k_proj"]}},
    "conv1d": {"config": GPT2, "lora": LINEAR | {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}},
    "conv1d_dora": {
        "config": GPT2, "lora": LINEAR | {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    },
    "zero": {"config": QWEN2, "lora": SOME, "zero": True},
    "only": {"config": QWEN2, "lora": LINEAR, "lora_only": True},
    "only_tied": {"config": TIED, "lora": SOME, "lora_only": True},
    "only_moe": {"config": QWEN3_MOE, "lora": SOME, "lora_only": True},
    "rslora": {"config": QWEN2, "lora": SOME | {"use_rslora": True}},
    "patterns": {"config": QWEN2, "lora": SOME | PATTERNS},
    "parameters": {"config": QWEN3_MOE, "lora": SOME | {"target_parameters": ["experts.down_proj"]}},
    "biases": {"config": QWEN2, "lora": SOME | {"bias": "lora_only"}},
    "tied_head": {"config": TIED, "lora": SOME | {"target_modules": ["lm_head", "q_proj"]}},
    "tied_embedding": {"config": TIED, "lora": SOME | {"target_modules": ["embed_tokens"]}},
}  # fmt: skip
NEED_CONFIG = ("rslora", "patterns")  # verl's lora_train_meta.json does not tell
ONLY = tuple(name for name in CASES if name.startswith("only"))
FULL = tuple(n for n in CASES if n not in (*ONLY, "zero", "parameters", "tied_embedding", "tied_head", "biases"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name in `CASES` → a `global_step_7` with `actor/`, `base/`, `adapter/` and the merged `reference/`."""
    folder = tmp_path_factory.mktemp("lora")
    paths = {name: folder / name / f"global_step_{STEP}" for name in CASES}
    make_checkpoints({paths[name]: case for name, case in CASES.items()}, 3)
    return paths


def options(name: str, path: Path) -> dict[str, Any]:
    config = {"lora_config": path / "adapter"} if name in NEED_CONFIG else {}
    return config | {"base_model": str(path / "base")}


# -- fused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["source", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", [*FULL, *ONLY])
def test_fused_equals_merge_and_unload(name, dtype, made, tmp_path):
    record = export(made[name], tmp_path / "ours", dtype=dtype, **options(name, made[name]))
    assert_same_model(tmp_path / "ours", oracle(made[name] / "reference", dtype, tmp_path / "theirs"))
    assert any(note.startswith("LoRA fused into") and "differ from the base" in note for note in record.notes)


def test_fused_loads_and_generates(made, tmp_path):
    record = export(made["plain"], tmp_path / "out", verify=True, **options("plain", made["plain"]))
    assert {k: v["status"] for k, v in record.verification.items()} == CHECKED | {"contract": "passed"}
    assert not (tmp_path / "out/adapter_config.json").exists()
    assert record.architectures == ("Qwen2ForCausalLM",)


@pytest.mark.parametrize("name", [*FULL, *ONLY])
def test_fused_equals_pefts_merge_of_the_shards(name, made, tmp_path):
    """The check before publication, by PEFT on the shards themselves."""
    path = made[name]
    export(path, tmp_path / "out", **options(name, path))
    spec = checkpoint_spec(path, **options(name, path))
    adapter = plan_model(spec.options, spec.checkpoint, spec.saved, FsdpFiles(spec.checkpoint).manifest()).adapter
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    base = path / "base" if name in ONLY else None
    trained = load_config(path / "actor/huggingface")
    found = compare(model, path / "actor", trained, adapter.config, base)
    assert "equal those of the shards merged by PEFT, and so do the logits" in found
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="1 tensors differ"):
        compare(model, path / "actor", trained, adapter.config, base)


def test_several_files_in_several_processes(made, tmp_path):
    export(made["dora"], tmp_path / "out", dtype="source", max_shard_size="20KB", workers=2)
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 2
    assert_same_model(tmp_path / "out", made["dora"] / "reference")


def test_adapter_that_learned_nothing_is_noted(made, tmp_path):
    record = export(made["zero"], tmp_path / "out", dtype="source")
    assert any("every lora_B is zero" in note for note in record.notes)
    assert_same_model(tmp_path / "out", made["zero"] / "base")


def test_adapter_lost_in_rounding_is_refused(own, tmp_path):
    made = edit(own("bf16"), lambda k, t: shrunk(t) if "lora_" in k else t)
    with pytest.raises(MergeError, match="none of them changed in bfloat16, though lora_B is not zero"):
        export(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the adapter ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in (*FULL, *ONLY) if n != "placed"])
def test_adapter_equals_pefts_own(name, made, tmp_path):
    path = made[name]
    verify = name in ("some", "saved", "embedding", "dora_bf16", "bias")
    record = export(path, tmp_path / "out", lora="adapter", dtype="source", verify=verify, **options(name, path))
    assert record.verification["load"]["status"] == ("passed" if verify else "skipped"), record.verification
    assert record.verification["generate"]["status"] == "skipped"
    assert not (tmp_path / "out/config.json").exists()
    ours, theirs = tensors(tmp_path / "out"), tensors(path / "adapter")
    theirs = {k: v for k, v in theirs.items() if ".base_layer." not in k}  # PEFT adds targeted embeddings
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) and ours[k].dtype == v.dtype for k, v in theirs.items())
    config, expected = (
        json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "out", path / "adapter")
    )
    for key in ("r", "lora_alpha", "task_type", "bias", "peft_type", "use_dora", "use_rslora", "rank_pattern"):
        assert config[key] == expected[key], key
    assert config["base_model_name_or_path"] == str(path / "base")
    model = PeftModel.from_pretrained(auto(path / "base"), tmp_path / "out", autocast_adapter_dtype=False)
    merged = model.merge_and_unload().state_dict()
    for key, tensor in tensors(path / "reference").items():
        if key in merged:  # not the experts, which are packed in memory
            assert torch.equal(merged[key], tensor), key


def test_target_modules_are_as_people_write_them(made, tmp_path):
    written = {}
    for name in ("some", "plain", "path", "saved"):
        export(made[name], tmp_path / name, lora="adapter")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        written[name] = config["target_modules"], config["modules_to_save"]
    assert written["some"] == (["q_proj", "v_proj"], None)
    assert written["plain"] == (sorted(f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")), None)
    assert written["path"] == ([f"model.layers.1.self_attn.{p}_proj" for p in "qv"], None)
    assert written["saved"] == (["q_proj", "v_proj"], ["lm_head", "model.norm"])


def test_adapter_in_the_export_dtype(made, tmp_path):
    export(made["some"], tmp_path / "out", lora="adapter")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["plain", pytest.param("only", marks=pytest.mark.full)])
def test_both(name, made, tmp_path):
    path = made[name]
    record = export(
        path, tmp_path / "both", lora="both", verify=True, max_shard_size="50KB", workers=2, **options(name, path)
    )
    for lora, folder in (("fused", ""), ("adapter", "adapter")):
        export(path, tmp_path / lora, lora=lora, **options(name, path))
        ours, alone = tensors(tmp_path / "both" / folder), tensors(tmp_path / lora)
        assert ours.keys() == alone.keys()
        assert all(torch.equal(ours[k], v) for k, v in alone.items())
    assert record.verification["adapter"]["status"] == record.verification["generate"]["status"] == "passed"
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= {f["name"] for f in record.files}
    checks = check_directory(tmp_path / "both")
    assert {k: v.status for k, v in checks.items()} == dict.fromkeys(
        ("hashes", "structure", "load", "generate", "adapter"), "passed"
    )


def test_command_line(made, tmp_path, capsys):
    path, out = made["rslora"], tmp_path / "out"
    command = ["export", str(path), "--output", str(out), "--lora", "adapter", "--base-model", str(path / "base")]
    assert main([*command, "--lora-config", str(path / "adapter/adapter_config.json")]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True
    assert main(["verify", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "LoRA of rank 4" in shown
    assert "PeftModel of Qwen2ForCausalLM" in shown
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    assert main(["verify", str(out)]) == 1


# -- refusals -------------------------------------------------------------------------------


@pytest.fixture
def own(made, tmp_path):
    """A copy that the test may damage."""
    return lambda name: shutil.copytree(made[name], tmp_path / name / f"global_step_{STEP}")


def edit(made: Path, change: Any) -> Path:
    """Put `change(name, tensor)` in the place of every tensor, or nothing where it is None."""
    for path in (made / "actor").glob("model_*.pt"):
        shards = {k: change(k, v) for k, v in torch.load(path, weights_only=False).items()}
        torch.save({k: v for k, v in shards.items() if v is not None}, path)
    return made


def shrunk(tensor: Any) -> Any:
    tensor.to_local().mul_(1e-6)
    return tensor


def rename(made: Path, old: str, new: str) -> Path:
    for path in (made / "actor").glob("model_*.pt"):
        shards = torch.load(path, weights_only=False)
        torch.save({k.replace(old, new): v for k, v in shards.items()}, path)
    return made


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_refused(made: Path, tmp_path: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(PlanError) as e:
        export(made, tmp_path / "out", **options)
    for part in parts:
        assert part in str(e.value)
    assert not (tmp_path / "out").exists()


def test_rank_pattern_without_its_config(made, tmp_path):
    assert_refused(
        made["patterns"], tmp_path, "q_proj.lora_A.default.weight: rank 8 by its shape, 4 according", "--lora-config"
    )


def test_config_beside_the_shards_is_found(own, tmp_path):
    made = own("rslora")
    shutil.copy(made / "adapter/adapter_config.json", made / "actor")
    export(made, tmp_path / "out", dtype="source")
    assert_same_model(tmp_path / "out", made / "reference")


def test_config_that_verl_saved_until_0_7_is_found_in_a_hold_too(own, tmp_path):
    """It wrote the attributes of PEFT's object, without the choices that `save_pretrained` makes."""
    made = own("rslora")
    (made / "actor/lora_train_meta.json").unlink()
    config = LoraConfig(**json.loads((made / "adapter/adapter_config.json").read_text()))
    saved = {**asdict(config), "peft_type": "LORA", "target_modules": sorted(config.target_modules)}
    (made / "actor/lora_adapter").mkdir()
    (made / "actor/lora_adapter/adapter_config.json").write_text(json.dumps(saved))
    held = tmp_path / "global_step_9/actor"
    assert link_files(made / "actor", (made / "actor").glob("*.pt"), held)
    export(held, tmp_path / "out", dtype="source")
    assert_same_model(tmp_path / "out", made / "reference")


def test_config_in_the_huggingface_folder_does_not_make_a_model_an_adapter(own, tmp_path):
    made = own("rslora")
    shutil.copy(made / "adapter/adapter_config.json", made / "actor/huggingface")
    export(made, tmp_path / "out", dtype="source")
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_no_alpha(own, tmp_path):
    made = own("some")
    (made / "actor/lora_train_meta.json").unlink()
    assert_refused(made, tmp_path, "lora_train_meta.json: not found", "lora_alpha", "--lora-config")


def test_alpha_that_verl_cut_to_zero(own, tmp_path):
    made = own("some")
    set_json(made / "actor/lora_train_meta.json", lora_alpha=0)
    assert_refused(made, tmp_path, "lora_alpha=0", "--lora-config")


def test_meta_of_another_rank(own, tmp_path):
    made = own("some")
    set_json(made / "actor/lora_train_meta.json", r=8)
    assert_refused(made, tmp_path, "rank 4 by its shape, 8 according to")


def test_config_that_contradicts_the_meta(own, tmp_path):
    made = own("some")
    set_json(made / "adapter/adapter_config.json", lora_alpha=99)
    assert_refused(made, tmp_path, "lora_alpha=99", "lora_train_meta.json says", lora_config=made / "adapter")


@pytest.mark.parametrize("changed", [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"peft_type": "ADALORA"}])
def test_config_of_something_else(changed, own, tmp_path):
    made = own("some")
    set_json(made / "adapter/adapter_config.json", **changed)
    assert_refused(
        made, tmp_path, "adapter_config.json", str(next(iter(changed.values()))), lora_config=made / "adapter"
    )


def test_lora_on_parameters(made, tmp_path):
    assert_refused(made["parameters"], tmp_path, "mlp.experts", "not supported")


def test_lora_on_one_of_two_tied_tensors(made, tmp_path):
    path = made["tied_embedding"]
    assert_refused(path, tmp_path, "model.embed_tokens.weight is tied with lm_head.weight", "lora: adapter")
    export(path, tmp_path / "out", lora="adapter")


def test_trained_biases(own, tmp_path):
    made = own("biases")
    given = {"lora_config": made / "adapter"}
    assert_refused(made, tmp_path, "bias=lora_only", "use fused", lora="adapter", **given)
    export(made, tmp_path / "out", dtype="source", **given)
    assert_same_model(tmp_path / "out", made / "reference")


def test_half_a_pair(own, tmp_path):
    lost = "layers.1.self_attn.q_proj.lora_B"
    made = edit(own("some"), lambda k, t: None if lost in k else t)
    assert_refused(made, tmp_path, "layers.1.self_attn.q_proj", "expected lora_A and lora_B")


def test_lora_of_a_module_is_lost(own, tmp_path):
    made = edit(own("some"), lambda k, t: None if "layers.1.self_attn.q_proj.lora_" in k else t)
    for mode in ("fused", "adapter"):
        assert_refused(
            made, tmp_path, "layers.1.self_attn.q_proj: wrapped for LoRA, but the shards hold no lora_A", lora=mode
        )


def test_magnitude_of_a_module_is_lost(own, tmp_path):
    made = edit(own("dora"), lambda k, t: None if "layers.1.self_attn.q_proj.lora_magnitude" in k else t)
    assert_refused(made, tmp_path, "layers.1.self_attn.q_proj: no lora_magnitude_vector")


@pytest.mark.parametrize("mode", ["fused", "adapter"])
def test_parts_of_another_peft_method(mode, own, tmp_path):
    made = rename(own("some"), "embed_tokens.weight", "embed_tokens.token_adapter.trainable_tokens_delta.default")
    assert_refused(made, tmp_path, "trainable_tokens_delta.default", "unexpected", lora=mode)


def test_lora_on_a_tied_head(made, tmp_path):
    assert_refused(made["tied_head"], tmp_path, "lm_head.weight is tied with model.embed_tokens.weight")


def test_missing_base_tensor(own, tmp_path):
    made = edit(own("some"), lambda k, t: None if "k_proj.weight" in k else t)
    assert_refused(made, tmp_path, "not a complete Qwen2ForCausalLM", "k_proj.weight")


def test_two_adapters(own, tmp_path):
    made = rename(own("some"), "layers.1.self_attn.q_proj.lora_A.default", "layers.1.self_attn.q_proj.lora_A.other")
    assert_refused(made, tmp_path, "['default', 'other']", "exactly one")


def test_unknown_part_of_lora(own, tmp_path):
    made = rename(own("some"), "layers.1.self_attn.q_proj.lora_B.default", "layers.1.self_attn.q_proj.lora_E.default")
    assert_refused(made, tmp_path, "lora_E.weight", "not supported")


def test_no_lora(checkpoint, tmp_path):
    assert_refused(checkpoint("even"), tmp_path, "lora=adapter, but the shards hold no LoRA", lora="adapter")


@pytest.mark.parametrize("base", [None, "no/such/model"])
def test_lora_only_without_its_base(base, made, tmp_path):
    assert_refused(made["only"], tmp_path, "save_lora_only", "--base-model DIR", str(base), base_model=base)


def test_lora_only_with_another_base(made, tmp_path):
    said = "lm_head.weight: expected [131, 48], found [131, 32]: not the base of this run"
    assert_refused(made["only"], tmp_path, said, base_model=str(made["conv1d"] / "base"))


def test_lora_only_with_a_quantized_base(own, tmp_path):
    """Its numbers mean nothing without their scales."""
    made = own("only")
    path, name = made / "base/model.safetensors", "model.layers.0.mlp.up_proj.weight"
    state = load_file(path)
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    assert_refused(made, tmp_path, f"{name} is float8_e4m3fn", "quantized base", base_model=str(made / "base"))


def test_lora_only_with_a_truncated_base(own, tmp_path):
    made = own("only")
    weights = made / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AutoExportError, match="truncated"):
        export(made, tmp_path / "out", base_model=str(made / "base"))


def test_lora_only_of_modules_to_save(own, tmp_path):
    made = edit(own("saved"), lambda k, t: t if "lora_" in k else None)
    found = {"lora_config": made / "adapter", "base_model": str(made / "base")}
    assert_refused(made, tmp_path, "modules_to_save=['lm_head', 'model.norm']", "save_lora_only", **found)


def test_lora_only_merges_in_the_dtype_of_training(made, tmp_path):
    """verl trains in float32 over a base that is stored in bfloat16."""
    half = tmp_path / "base"
    model = auto(made["only"] / "base").to(torch.bfloat16)
    model.save_pretrained(half)
    export(made["only"], tmp_path / "out", dtype="source", base_model=str(half))
    trained = PeftModel.from_pretrained(model.float(), made["only"] / "adapter")
    expected = trained.merge_and_unload().state_dict()
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())

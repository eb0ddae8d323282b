"""Bases that hold more than the class reads, or name it otherwise: what transformers loads is exported, and no more."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.bases import config_of, contract, edit_config, edit_tensors, make_base
from tests.support.checkpoints import STEP
from tests.support.exports import export, tensors
from tests.support.families import config as family
from tests.support.sharding import QWEN2, QWEN3_MOE, build
from verl_autoexport.cli.main import main
from verl_autoexport.config.reading import load_config
from verl_autoexport.errors import ConfigError, PlanError
from verl_autoexport.export.pipeline import export_to_registry
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.model.base_compatibility import check_start
from verl_autoexport.model.base_model import counts_predicting, find_base
from verl_autoexport.model.planner import capture_dtypes, plan_model
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles
from verl_autoexport.verify.directory import check_directory

Tensors = dict[str, torch.Tensor]
SIZES = {"vocab_size": 131, "hidden_size": 32}
BLOOM = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 2, "n_head": 4} | SIZES
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 131, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_positions": 64,
}  # fmt: skip
BERT = SIZES | {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
BODY = QWEN2 | {"architectures": ["Qwen2Model"]}
UNTIED = QWEN2 | {"vocab_size": 128}
MOE_UP = "model.layers.{}.mlp.experts.0.up_proj.weight"


def train(base: Path, run: Path, trained: dict[str, Any] | None = None, cls: Any = None) -> Path:
    """A `global_step_7` of a run that began with `base`, as one rank saves it; `trained` overrides its config."""
    cls = cls or getattr(transformers, config_of(base)["architectures"][0])
    model = cls.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.01)
    actor = run / f"global_step_{STEP}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    model.config.update({"architectures": [cls.__name__]} | (trained or {}))
    model.config.save_pretrained(actor / "huggingface")
    return actor.parent


def rename(pattern: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {re.sub(pattern, new, name): tensor for name, tensor in state.items()}


def spelled_base(path: Path, config: dict[str, Any], change: Callable[[Tensors], Tensors]) -> Path:
    base = make_base(path, config)
    state = change(load_file(base / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in state.items()}, base / "model.safetensors", {"format": "pt"})
    return base


def start(base: Path, **options: Any) -> dict[str, Any]:
    return check_start(str(base), "bfloat16", False, None, **options).to_check()


def assert_trained(out: Path, step: Path) -> None:
    """`out` loads as the tensors of `step` in bfloat16."""
    cls = getattr(transformers, config_of(out)["architectures"][0])
    found = cls.from_pretrained(out, dtype="auto").state_dict()
    shards = torch.load(step / "actor/model_world_size_1_rank_0.pt")
    assert found.keys() == shards.keys()
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in shards.items())


# -- names ----------------------------------------------------------------------------------

SPELLINGS = {
    "no prefix": (BLOOM, rename(r"^transformer\.", "")),
    "no prefix of Conv1D": (GPT2, rename(r"^transformer\.", "")),
    "no prefix beside a head": (QWEN2, rename(r"^model\.", "")),
    "no prefix of some": (QWEN2, rename(r"^model\.layers\.1\.", "layers.1.")),
    "a prefix too many": (BODY, rename("^", "model.")),
    "no prefix of experts": (QWEN3_MOE, rename(r"^model\.", "")),
    "no prefix of an encoder": (BERT, rename(r"^bert\.", "")),
    "norms of old": (
        BERT,
        lambda s: {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in s.items()},
    ),
    "only the tied head": (GPT2, rename(r"^transformer\.wte\.", "lm_head.")),
    "packed experts": (
        QWEN3_MOE,
        lambda s: (
            {k: v for k, v in s.items() if ".experts." not in k}
            | {k: v for k, v in build(QWEN3_MOE, "bfloat16").state_dict().items() if ".experts." in k}
        ),
    ),
    "as in memory": (
        family("LlavaForConditionalGeneration"),
        lambda s: rename(r"^language_model\.model\.", "model.language_model.")(
            rename(r"^language_model\.lm_head", "lm_head")(
                rename(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.")(s)
            )
        ),
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_names_are_those_of_the_base(case, tmp_path):
    base = spelled_base(tmp_path / "base", *SPELLINGS[case])
    assert start(base)["status"] == "passed"
    step = train(base, tmp_path)
    verified = case == "no prefix"  # in a process of its own, twice
    record = export(step, tmp_path / "out", base_model=str(base), verify=verified, max_shard_size="40KB")
    ours, theirs = tensors(tmp_path / "out"), tensors(base)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    (reason,) = contract(record)["explained"]
    assert reason == ("held in the base as in memory" if "packed" in case else "named as in the base")
    assert not verified or record.verification["logits"]["status"] == "passed"
    assert check_directory(tmp_path / "out", load=verified)["structure"].status == "passed"
    assert_trained(tmp_path / "out", step)
    assert record.notes[:-2] == ()  # no tokenizer, no generation config at most


def test_names_of_the_base_with_the_dtypes_and_layout_of_the_base(tmp_path):
    def change(state: Tensors) -> Tensors:
        state = rename(r"^model\.", "")(state)
        return {k: v.float() if "layernorm" in k else v.half() for k, v in state.items()}

    base = spelled_base(tmp_path / "base", QWEN2, change)
    step = train(base, tmp_path)
    export(step, tmp_path / "out", base_model=str(base), dtype="base")
    ours, theirs = tensors(tmp_path / "out"), tensors(base)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}


def test_versions_share_what_does_not_change_under_the_names_of_the_base(registry, tmp_path):
    large = QWEN2 | {"vocab_size": 16384}  # a file of less than 1 MiB is not shared
    base = spelled_base(tmp_path / "base", large, rename(r"^model\.", ""))
    step = train(base, tmp_path)
    spec = checkpoint_spec(step, base_model=str(base), verify=False)
    spec = replace(spec, frozen=frozenset({"model.embed_tokens.weight"}))
    versions = [export_to_registry(replace(spec, step=n), registry, LocalRunner(1)) for n in (1, 2)]
    apart = [f for v in versions for f in v.record.files if f.get("apart")]
    assert [f.get("linked", False) for f in apart] == [False, True]
    assert load_file(versions[1].path / apart[1]["name"]).keys() == {"embed_tokens.weight"}


def test_a_lora_run_that_saved_no_base_finds_it_under_its_own_names(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = spelled_base(tmp_path / "base", QWEN2, rename(r"^model\.", ""))
    step = train(base, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    shards = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    torch.save(shards, step / "actor/model_world_size_1_rank_0.pt")
    meta = {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    (step / "actor/lora_train_meta.json").write_text(json.dumps(meta))
    record = export(step, tmp_path / "out", base_model=str(base), verify=True)
    assert record.verification["logits"]["status"] == "passed"
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()
    assert contract(record)["explained"]["LoRA fused in"] == [f"layers.{i}.self_attn.q_proj.weight" for i in range(2)]


# -- more than the class reads ----------------------------------------------------------------


def predicting(prefix: str) -> Callable[[Tensors], Any]:
    """Adds a layer for multi-token prediction: a decoder layer under `prefix`, and a projection."""

    def change(state: Tensors) -> None:
        last = {k: v for k, v in state.items() if k.startswith("model.layers.1.")}
        state.update({k.replace("model.layers.1.", prefix): v + 1 for k, v in last.items()})
        state[f"{prefix}eh_proj.weight"] = torch.full((32, 64), 0.5, dtype=torch.bfloat16)
        state[f"{prefix}mlp.gate.e_score_correction_bias"] = torch.full((6,), 0.3)

    return change


def mtp_base(path: Path, prefix: str = "model.layers.2.", **values: Any) -> Path:
    base = edit_tensors(make_base(path, QWEN3_MOE), predicting(prefix))
    edit_config(base, **({"num_nextn_predict_layers": 1} | values))
    return base


@pytest.mark.parametrize(
    "prefix", ["model.layers.2.", "model.layers.61.", "mtp.", "model.mtp_layers.0.", "mtp.layers.0."]
)
def test_layers_that_the_class_does_not_read_are_left_out(prefix, tmp_path):
    base = mtp_base(tmp_path / "base", prefix)
    added = sorted(k for k in tensors(base) if k.startswith(prefix))
    assert start(base)["explained"] == {"not read by Qwen3MoeForCausalLM": added}
    step = train(base, tmp_path, {"num_nextn_predict_layers": 0})  # as verl sets it
    record = export(step, tmp_path / "out", base_model=str(base))
    assert contract(record)["explained"] == {"not read by Qwen3MoeForCausalLM": added}
    assert any("never read" in note and added[0] in note for note in record.notes)
    assert tensors(tmp_path / "out").keys() == tensors(base).keys() - set(added)
    assert config_of(tmp_path / "out") == config_of(base) | {"num_nextn_predict_layers": 0}
    assert_trained(tmp_path / "out", step)


def test_layers_left_out_are_not_counted_though_the_run_counts_them(tmp_path):
    base = mtp_base(tmp_path / "base")
    step = train(base, tmp_path)
    record = export(step, tmp_path / "out", base_model=str(base), verify=True)
    assert config_of(tmp_path / "out") == config_of(base) | {"num_nextn_predict_layers": 0}
    assert record.verification["logits"]["status"] == "passed"


def test_nested_counts_are_found_and_others_are_not():
    keys = ["num_nextn_predict_layers", "text_config.mtp_num_hidden_layers", "mtp_num_layers", "n_predict"]
    assert all(map(counts_predicting, [*keys, "num_mtp_layers", "num_mtp_modules"]))
    assert not any(map(counts_predicting, ["num_hidden_layers", "mtp_layers_block_type", "text_config", "num_experts"]))


# -- what transformers would not load rightly ---------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a layer less": (
        lambda s: {k: v for k, v in s.items() if "layers.1." not in k},
        "not in the base: model.layers.1.",
    ),
    "a layer less and others more": (rename(r"layers\.1\.", "mtp."), "missing: model.mtp.input_layernorm.weight"),
    "a tensor renamed": (
        rename(r"layers\.0\.mlp\.up_proj", "layers.0.mlp.w1"),
        f"missing: model.layers.0.mlp.w1.weight; not in the base: {UP}",
    ),
    "another prefix": (rename(r"^model\.", "decoder."), "missing: decoder."),
    "a tensor twice": (lambda s: s | {"norm.weight": s[NORM].clone()}, "missing: norm.weight"),
    "another shape under another name": (
        lambda s: {k: v for k, v in s.items() if k != NORM} | {"norm.weight": s[NORM][:24]},
        "of another shape: norm.weight (base [24], here [48])",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_bases_are_refused_and_the_way_out_is_named(case, tmp_path):
    change, message = WRONG[case]
    step = train(make_base(tmp_path / "right", UNTIED), tmp_path)
    base = spelled_base(tmp_path / "base", UNTIED, change)
    for attempt in (
        lambda: start(base),
        lambda: export(step, tmp_path / "out", base_model=str(base)),
        lambda: export(step, tmp_path / "out", base_model=str(base), carry_unread=True),
    ):
        with pytest.raises(PlanError) as caught:
            attempt()
        assert message in str(caught.value)
        assert "autoexport.weights.base_check (--base-check): warn or off" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            QWEN2 | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            QWEN2,
        ),  # whose biases it does not read
        (QWEN2, QWEN2 | {"num_hidden_layers": 3}),  # which its own class does read
    ],
)
def test_what_the_bases_own_class_reads_must_be_written(ours, theirs, tmp_path):
    step = train(make_base(tmp_path / "right", ours), tmp_path)
    base = make_base(tmp_path / "base", theirs)
    assert start(base)["status"] == "passed"
    with pytest.raises(PlanError, match=r"missing: model\.layers\.\d\."):
        export(step, tmp_path / "out", base_model=str(base))


# -- base_check -------------------------------------------------------------------------------


def test_a_person_may_take_the_responsibility(tmp_path, caplog):
    step = train(make_base(tmp_path / "right", UNTIED), tmp_path)
    base = spelled_base(tmp_path / "base", UNTIED, WRONG["a tensor renamed"][0])
    (base / "tokenizer.json").write_text("the base's")
    with caplog.at_level(logging.WARNING):
        record = export(step, tmp_path / "warned", base_model=str(base), base_check="warn", verify=True)
        assert start(base, base_check="warn")["status"] == "differs"
    assert UP in caplog.text
    assert contract(record)["status"] == "differs"
    assert UP in contract(record)["detail"]
    assert any(UP in note for note in record.notes)
    assert record.verification["logits"]["status"] == "passed"
    record = export(step, tmp_path / "off", base_model=str(base), base_check="off")
    assert start(base, base_check="off")["status"] == "skipped"
    assert contract(record)["status"] == "skipped"
    assert "base_check" in contract(record)["detail"]
    for out in (tmp_path / "warned", tmp_path / "off"):
        assert tensors(out).keys() == tensors(tmp_path / "right").keys()
        assert (out / "tokenizer.json").exists()


def test_a_damaged_base_is_passed_over_only_when_asked(tmp_path):
    base = make_base(tmp_path / "base", UNTIED)
    step = train(base, tmp_path)
    (base / "model.safetensors").write_bytes(b"x" * 100)
    for value in ("strict", "warn"):
        with pytest.raises(PlanError, match=r"damaged: .*--base-check\): off"):
            export(step, tmp_path / "out", base_model=str(base), base_check=value)
    record = export(step, tmp_path / "out", base_model=str(base), base_check="off")
    assert "damaged" in contract(record)["detail"]


def test_keys_and_options(tmp_path, capsys):
    found = load_config({"output_dir": str(tmp_path), "weights": {"base_check": "warn", "carry_unread": True}})
    assert (found.weights.base_check, found.weights.carry_unread) == ("warn", True)
    with pytest.raises(ConfigError, match=r"weights\.base_check: expected one of strict \| warn \| off"):
        load_config({"output_dir": str(tmp_path), "weights": {"base_check": "lax"}})
    with pytest.raises(ConfigError, match=r"carry_unread=true needs .*base_check=off"):
        load_config({"output_dir": str(tmp_path), "weights": {"base_check": "off", "carry_unread": True}})
    base = mtp_base(tmp_path / "base")
    step = train(base, tmp_path)
    with pytest.raises(ConfigError, match=r'base_check: expected one of strict \| warn \| off, found "lax"'):
        export(step, tmp_path / "out", base_check="lax")
    command = ["export", str(step), "--base-model", str(base), "--no-verify", "--output"]
    assert main([*command, str(tmp_path / "carried"), "--carry-unread"]) == 0
    assert tensors(tmp_path / "carried").keys() == tensors(base).keys()
    edit_tensors(base, lambda s: s.pop("model.norm.weight"))
    assert main([*command, str(tmp_path / "strict")]) == 1
    assert "--base-check" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "warned"), "--base-check", "warn"]) == 0


# -- carry_unread -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "base", "source"])
@pytest.mark.parametrize("prefix", ["model.layers.2.", "mtp.layers.0."])
def test_unread_tensors_are_carried_over(dtype, prefix, tmp_path):
    base = mtp_base(tmp_path / "base", prefix, num_nextn_predict_layers=1)
    step = train(base, tmp_path, {"num_nextn_predict_layers": 0})
    verified = (dtype, prefix) == ("bfloat16", "model.layers.2.")
    out = tmp_path / "out"
    record = export(
        step, out, base_model=str(base), dtype=dtype, carry_unread=True, max_shard_size="40KB", verify=verified
    )
    theirs, ours = tensors(base), tensors(out)
    carried = sorted(k for k in theirs if k.startswith(prefix))
    assert ours.keys() == theirs.keys()
    assert contract(record)["carried"] == carried
    assert any("taken along" in note and carried[0] in note for note in record.notes)
    for name in carried:
        own = theirs[name].dtype
        expected = torch.float32 if dtype == "float32" else own
        assert ours[name].dtype == expected
        assert torch.equal(ours[name], theirs[name].to(expected))
    assert ours[f"{prefix}mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == ours.keys()
    assert config_of(out)["num_nextn_predict_layers"] == 1
    if verified:
        assert record.verification["load"]["status"] == record.verification["logits"]["status"] == "passed"
        assert {c.status for c in check_directory(out).values()} == {"passed"}
    assert_trained(out, step)


def test_only_what_was_carried_may_be_unexpected(tmp_path):
    base = mtp_base(tmp_path / "base")
    out = tmp_path / "out"
    export(train(base, tmp_path), out, base_model=str(base), carry_unread=True)
    whole = out / "model.safetensors"
    state = load_file(whole)
    save_file(state | {"strange.weight": torch.ones(3)}, whole, {"format": "pt"})
    found = check_directory(out)
    assert "strange.weight" in found["structure"].detail
    assert "strange.weight" in found["load"].detail
    assert {found[name].status for name in ("hashes", "structure", "load")} == {"failed"}
    save_file({k: v for k, v in state.items() if "eh_proj" not in k}, whole, {"format": "pt"})
    assert "eh_proj" in check_directory(out, load=False)["structure"].detail


def test_nothing_to_carry_from(tmp_path):
    base = make_base(tmp_path / "base", UNTIED)
    step = train(base, tmp_path)
    record = export(step, tmp_path / "same", base_model=str(base), carry_unread=True)
    assert contract(record).keys() == {"status", "detail"}
    for options, reason in (
        ({}, "no base model was given"),
        ({"base_model": str(tmp_path / "none")}, "is no local directory"),
        ({"base_model": str(base), "base_check": "off"}, "is off"),
    ):
        with pytest.raises(ConfigError, match=f"carry_unread .*{reason}"):
            export(step, tmp_path / "out", carry_unread=True, **options)
    with pytest.raises(ConfigError, match="carry_unread"):
        check_start(None, "bfloat16", False, None, carry_unread=True)


def test_workers_are_not_asked_for_what_is_carried(tmp_path):
    base = mtp_base(tmp_path / "base")
    spec = checkpoint_spec(train(base, tmp_path), base_model=str(base), carry_unread=True)
    manifest = FsdpFiles(spec.checkpoint).manifest()
    planned = plan_model(spec.options, spec.checkpoint, spec.saved, manifest)
    assert planned.compatibility.carried
    assert capture_dtypes(spec.options, planned).keys() == manifest.tensors.keys()


# -- a base named by its id ----------------------------------------------------------------------


@pytest.fixture
def cached_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`org/name` in a Hugging Face cache of its own, as `huggingface_hub` lays it out."""
    from huggingface_hub import constants

    folder = tmp_path / "hub/models--org--name"
    snapshot = folder / "snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    make_base(snapshot, UNTIED, max_shard_size="40KB")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_base_in_the_cache_is_found_by_its_id(cached_base, tmp_path):
    found, reason = find_base("org/name")
    assert (found.directory, reason) == (cached_base, "")
    step = train(cached_base, tmp_path)
    record = export(step, tmp_path / "out", base_model="org/name", dtype="base")
    assert contract(record)["status"] == "passed"
    assert record.base_model == "org/name"
    assert start(Path("org/name"))["status"] == "passed"


def test_a_base_that_is_not_all_in_the_cache_is_none_and_the_cost_is_told(cached_base):
    min(cached_base.glob("*.safetensors")).unlink()
    for name, reason in (
        ("org/name", "is in the Hugging Face cache without model-00001-of-"),
        ("org/other", "is no local directory, nor in the Hugging Face cache here"),
        ("hdfs://a/b", "is no local directory"),
    ):
        found, told = find_base(name)
        assert found is None
        assert reason in told
        assert all(part in told for part in ("not compared", "config.json", "tokenizer"))

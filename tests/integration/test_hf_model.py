"""Steps with Hugging Face weights that verl wrote: exported as they were saved, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import hf_weights
from tests.support.chaos import request_for
from tests.support.checkpoints import CHECKED, EMBED, HEAD, NORM, STEP, truncate
from tests.support.exports import assert_same_model, auto, export, oracle, tensors
from tests.support.families import config as family
from tests.support.hf_weights import FSDP, LAYOUTS, MEGATRON
from tests.support.sharding import QWEN2, QWEN3_MOE, _add_lora, build
from verl_autoexport.cli.main import main
from verl_autoexport.config.reading import load_config
from verl_autoexport.errors import ConfigError, PlanError, SourceError
from verl_autoexport.export import places
from verl_autoexport.export.pipeline import export_to_registry, run_export
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.merge.plan import whole
from verl_autoexport.model.dtypes import model_dtype
from verl_autoexport.model.shard_names import whole_model
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.registry.store import Registry
from verl_autoexport.service.controller import RunController
from verl_autoexport.service.exporter import Exporter
from verl_autoexport.service.local_service import LocalExportService
from verl_autoexport.service.request import RunInfo
from verl_autoexport.shards.safetensors_files import manifest_of
from verl_autoexport.sources import holds
from verl_autoexport.sources.formats import open_source

VALUE = QWEN2 | {"num_labels": 1, "architectures": ["Qwen2ForTokenClassification"]}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2,
    "tied": QWEN2 | {"tie_word_embeddings": True},
    "moe": QWEN3_MOE,  # experts one by one on disk, packed in memory
    "gemma3_text": family("gemma3_text"),
    "qwen2_5_vl": family("qwen2_5_vl"),  # other prefixes on disk
    "joined": family("HrmTextForCausalLM"),  # a tensor on disk is made of several in memory
    "turned": family("Ernie4_5_VLMoeForConditionalGeneration"),  # transposed on the way to disk
    "unsaved": family("MarianMTModel"),  # tensors in memory that are not on disk
}
_built: dict[str, Any] = {}


def model(name: str) -> Any:
    """A model of `MODELS`, only to be saved."""
    if name not in _built:
        _built[name] = build(MODELS[name], "float32")
    return _built[name]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return tmp_path / "run" / f"global_step_{STEP}"


def same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (name, ours[name].dtype) == (name, tensor.dtype)
        assert torch.equal(ours[name], tensor), name


# -- the same model as was saved -------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "max_shard_size"),
    [("bfloat16", "20KB"), ("bfloat16", "5GB"), ("float32", "20KB"), ("source", "5GB"), ("base", "20KB")],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_as_saved(name, dtype, max_shard_size, step, tmp_path):
    saved = hf_weights.save(model(name), step, max_shard_size="50KB")
    base = oracle(saved, "bfloat16", tmp_path / "base") if dtype == "base" else None
    record = export(step, tmp_path / "out", dtype=dtype, max_shard_size=max_shard_size, base_model=base and str(base))
    expected = saved if dtype in ("float32", "source") else base or oracle(saved, dtype, tmp_path / "oracle")
    same_tensors(tmp_path / "out", expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or max_shard_size == "5GB"
    assert record.source["backend"] == "hf_model"
    assert any("which hold no checksums" in note for note in record.notes)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("unsaved", "joined")])
def test_verified_by_another_path(name, step, tmp_path):
    hf_weights.save(model(name), step)
    record = export(step, tmp_path / "out", verify=True)
    statuses = {check: found["status"] for check, found in record.verification.items()}
    if name == "qwen2_5_vl":  # which does not run without images here
        statuses["generate"] = "passed"
    assert statuses == CHECKED
    assert record.verification["logits"]["detail"].startswith("all ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, step, tmp_path):
    saved = hf_weights.save(model("tied"), step, LAYOUTS[layout], max_shard_size="50KB")
    for number, place in enumerate({step, saved.parent, step / LAYOUTS[layout].split("/")[0]} - {saved}):
        record = export(place, tmp_path / str(number), dtype="float32")
        assert record.step == STEP
        assert record.source["path"] == str(saved.parent)
        assert_same_model(tmp_path / str(number), saved)
    auto(tmp_path / "0")


def test_by_hand(step, tmp_path, capsys):
    saved = hf_weights.save(model("qwen2"), step, MEGATRON)
    assert main(["export", str(step), "--output", str(tmp_path / "out"), "--dtype", "float32", "--no-verify"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert_same_model(tmp_path / "out", saved)


@pytest.mark.parametrize("architecture", ["Qwen2ForTokenClassification", "Qwen3MoeForTokenClassification"])
def test_value_models(architecture, step, tmp_path):
    """verl's config.json still names the language model."""
    config = (QWEN2 if "Qwen2" in architecture else QWEN3_MOE) | {"num_labels": 1, "architectures": [architecture]}
    saved = build(config, "float32")
    named = {"architectures": [architecture.replace("TokenClassification", "CausalLM")]}
    hf_weights.save(saved, step, "critic/huggingface", named)
    record = export(step / "critic", tmp_path / "out", dtype="float32", verify=True)
    assert record.architectures == (architecture,)
    assert record.verification["logits"]["status"] == "passed"
    saved.save_pretrained(tmp_path / "reference")
    assert_same_model(tmp_path / "out", tmp_path / "reference")


def test_fsdp_with_lora_saves_the_names_of_peft(step, tmp_path):
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    trained = _add_lora(build(QWEN2, "float32"), lora, False, tmp_path)
    saved = step / FSDP
    build(QWEN2, "float32").save_pretrained(saved, state_dict=trained.state_dict())
    (saved.parent / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    export(step, tmp_path / "out", dtype="float32", verify=True)
    assert_same_model(tmp_path / "out", tmp_path / "reference")


def test_what_the_class_does_not_read_is_left_out(step, tmp_path):
    """Multi-token prediction, which a bridge copies from the base."""
    small = build(family("glm4_moe") | {"num_hidden_layers": 2}, "float32")
    ignored = small._keys_to_ignore_on_load_unexpected
    extra = next(name for name in ("model.layers.92.eh_proj.weight", "model.layers.46.eh_proj.weight") if any(
        name.startswith(pattern.replace("\\", "").split(".*")[0]) for pattern in ignored
    ))  # fmt: skip
    saved = hf_weights.save(small, step)
    expected = load_file(saved / "model.safetensors")
    save_file(expected | {extra: torch.ones(2, 2)}, saved / "model.safetensors", {"format": "pt"})
    record = export(step, tmp_path / "out", dtype="float32", verify=True)
    assert tensors(tmp_path / "out").keys() == expected.keys()
    assert f"left out, since Glm4MoeForCausalLM does not read them: {extra}" in record.notes


def test_names_as_the_base_spells_them(step, tmp_path):
    """A bridge writes the names of the model that training began with, here those of an older transformers."""

    def old(name: str) -> str:
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    saved = hf_weights.save(build(family("gemma3"), "float32"), step)
    found = {old(name): tensor for name, tensor in tensors(saved).items()}
    save_file(found, saved / "model.safetensors", {"format": "pt"})
    shutil.copytree(saved, tmp_path / "base")
    export(step, tmp_path / "out", dtype="float32", base_model=str(tmp_path / "base"), verify=True)
    assert any("vision_tower.vision_model." in name for name in tensors(saved))
    same_tensors(tmp_path / "out", saved)


class Turned(Skeleton):
    """A model that has a square matrix transposed in memory, under the name that it has on disk."""

    name, config = "Turned", None
    tensors = {"w": torch.empty(3, 3, device="meta")}  # noqa: RUF012 - a Protocol's attribute

    def to_disk(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {name: tensor.T for name, tensor in tensors.items()}

    def place(self, name: str) -> tuple[str, str | None]:
        return name, None


def test_a_layout_that_the_shape_does_not_show(tmp_path):
    save_file({"w": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    shards = manifest_of([tmp_path / "model.safetensors"])
    (turned,) = whole_model(Turned(), shards, "source")[1]
    assert turned.pieces[0].dims == (1, 0), "shards have the layout in memory"
    (output,) = whole_model(Turned(), replace(shards, on_disk=True), "source")[1]
    assert output.pieces == whole("w", (3, 3)), "files of a saved model do not"


class Prefixed(Turned):
    """A model of which no tensor has the same name in memory and on disk."""

    tensors = {"inner.w": torch.empty(3, 3, device="meta")}  # noqa: RUF012

    def place(self, name: str) -> tuple[str, str | None]:
        return f"inner.{name}", None


def test_the_dtype_of_a_model_that_is_taken_as_it_is(tmp_path):
    save_file({"w": torch.ones(3, 3, dtype=torch.float16)}, tmp_path / "model.safetensors")
    shards = replace(manifest_of([tmp_path / "model.safetensors"]), on_disk=True)
    assert model_dtype(Prefixed(), shards, "source") == "float16"
    assert model_dtype(Prefixed(), shards, "bfloat16") == "bfloat16"


def test_rank_files_win(own_checkpoint, tmp_path):
    """They have the dtype of training."""
    made = own_checkpoint("even")
    config = QWEN2 | {"vocab_size": 128}
    hf_weights.save(build(config, "float32", scale=0.1), made)
    record = export(made, tmp_path / "out", dtype="source")
    assert record.source["backend"] == "fsdp2"
    same_tensors(tmp_path / "out", made / "reference")
    shutil.copytree(made / "actor", made / "policy")
    with pytest.raises(SourceError, match=r"actor/ and policy/ both hold shards"):
        export(made, tmp_path / "again")


# -- refused by name -------------------------------------------------------------------------

FILE = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def as_one_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = tensors(folder)
    change(found)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 8)


def only_adapter(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    beside_an_adapter(folder)


def beside_an_adapter(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, folder / "adapter/adapter_model.safetensors")


def older_adapter(folder: Path) -> None:
    (folder.parent / "adapter_checkpoint").mkdir()
    (folder.parent / "adapter_checkpoint/adapter_rank_0.pt").touch()


DAMAGED: dict[str, tuple[str, Damage, str]] = {
    "cut": (FSDP, lambda f: truncate(f / FILE), rf"{FILE}: .* ends beyond the file's \d+ bytes; the file is truncated"),
    "cut in the header": (FSDP, lambda f: truncate(f / FILE, 40), rf"{FILE}: .*not a whole safetensors file"),
    "empty": (FSDP, lambda f: truncate(f / FILE, 0), rf"{FILE}: "),
    "too long": (FSDP, lambda f: grow(f / FILE), rf"{FILE}: \d+ bytes expected from its header, \d+ found"),
    "a file is missing": (FSDP, lambda f: (f / FILE).unlink(), rf"{FILE}: missing, but {INDEX} names it \(1 of 3"),
    "the index names what is not there": (
        FSDP,
        lambda f: edit_json(f / INDEX, lambda d: d["weight_map"].update({"mtp.weight": FILE})),
        rf"{INDEX}: mtp.weight should be in {FILE}, which lacks it",
    ),
    "the index lacks a tensor": (
        FSDP,
        lambda f: edit_json(f / INDEX, lambda d: d["weight_map"].pop(NORM)),
        rf"{INDEX}: it lacks {NORM}, which is in .*safetensors",
    ),
    "the index names another file": (
        FSDP,
        lambda f: edit_json(f / INDEX, lambda d: d["weight_map"].update({EMBED: "model-00003-of-00003.safetensors"})),
        rf"{INDEX}: {EMBED} should be in model-00003-of-00003.safetensors, but is in",
    ),
    "no index": (FSDP, lambda f: (f / INDEX).unlink(), r"huggingface: no model.safetensors and no"),
    "the index is no JSON": (FSDP, lambda f: truncate(f / INDEX), rf"{INDEX}: its weight_map cannot be read"),
    "two saves": (
        FSDP,
        lambda f: save_file(tensors(f), f / "model.safetensors"),
        rf"{INDEX}: it names other files than model.safetensors, which lies beside it: two saves",
    ),
    "both layouts": (
        FSDP,
        lambda f: shutil.copytree(f, f.parent / "model/huggingface"),
        r"actor/huggingface and .*actor/model/huggingface both hold weights",
    ),
    "not complete": (
        MEGATRON,
        lambda f: (f.parents[1] / "ckpt_contents.json").unlink(),
        r"actor/ckpt_contents.json: not there. verl writes it as the last file of a save",
    ),
    "no JSON": (
        MEGATRON,
        lambda f: truncate(f.parents[1] / "ckpt_contents.json"),
        r"actor/ckpt_contents.json: cannot be read: not JSON",
    ),
    "contents without weights": (
        MEGATRON,
        lambda f: edit_json(f.parents[1] / "ckpt_contents.json", lambda d: d["contents"].pop("model")),
        r"actor/ckpt_contents.json: it lists no Hugging Face weights in model/huggingface",
    ),
    "peft": (
        MEGATRON,
        lambda f: edit_json(f.parents[1] / "ckpt_contents.json", lambda d: d["backend"].update(peft=True)),
        r"actor/ckpt_contents.json: backend.peft is true: the run trained LoRA with Megatron",
    ),
    "adapter alone": (MEGATRON, only_adapter, r"huggingface/adapter: the run trained LoRA .* saves only the adapter"),
    "adapter alone, before 0.9": (FSDP, only_adapter, r"huggingface/adapter: the run trained LoRA with Megatron"),
    "adapter beside the base": (FSDP, beside_an_adapter, r"huggingface/adapter: .* the untrained base model's"),
    "adapter up to 0.7": (FSDP, older_adapter, r"actor/adapter_checkpoint: the run trained LoRA with Megatron"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_saves_are_refused(case, step, tmp_path):
    where, damage, message = DAMAGED[case]
    folder = hf_weights.save(model("qwen2"), step, where, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    damage(folder)
    with pytest.raises(SourceError, match=message) as e:
        export(step, tmp_path / "out")
    assert str(step) in str(e.value)
    assert not (tmp_path / "out").exists()


def drop_expert(found: dict[str, torch.Tensor]) -> None:
    del found["model.layers.1.mlp.experts.3.up_proj.weight"]


NOT_THE_MODEL: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": ("qwen2", lambda t: t.pop(HEAD), rf"not a complete Qwen2ForCausalLM: missing {HEAD}"),
    "unknown": ("qwen2", lambda t: t.update(a=torch.ones(1)), r"unexpected a; .* are missing; a are unknown"),
    "another shape": ("qwen2", lambda t: t.update({NORM: torch.ones(7)}), rf"wrong shape or kind {NORM}"),
    "one expert": ("moe", drop_expert, r"names that it has on disk, model.layers.1.mlp.experts.3.up_proj.weight are"),
    "one of a joined": ("joined", lambda t: t.pop(sorted(t)[0]), r"of the names that it has on disk, \w+"),
    "untied": ("tied", lambda t: t.update({HEAD: t[EMBED] + 1}), rf"{HEAD} and {EMBED} are tied .* values differ"),
}


@pytest.mark.parametrize("case", NOT_THE_MODEL)
def test_other_tensors_than_the_models_are_refused(case, step, tmp_path):
    name, change, message = NOT_THE_MODEL[case]
    as_one_file(hf_weights.save(model(name), step, max_shard_size="100KB"), change)
    with pytest.raises(PlanError, match=rf"(?i){message}"):
        export(step, tmp_path / "out")


def test_an_alias_with_the_same_values_is_written_once(step, tmp_path):
    saved = hf_weights.save(model("tied"), step, max_shard_size="100KB")
    expected = tensors(saved)
    as_one_file(saved, lambda found: found.update({HEAD: found[EMBED].clone()}))
    record = export(step, tmp_path / "out", dtype="float32", verify=True)
    assert tensors(tmp_path / "out").keys() == expected.keys()
    assert record.verification["logits"]["status"] == "passed"


NOTHING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Megatron's own format": (
        lambda actor: (actor / "model/dist_ckpt").mkdir(parents=True),
        r"There is Megatron's own format in .*actor/model/dist_ckpt, which is not read: save with megatron.use_mbridge",
    ),
    "the older one": (lambda actor: (actor / "dist_ckpt").mkdir(), r"Megatron's own format in .*actor/dist_ckpt"),
    "pickles": (
        lambda actor: (actor / "huggingface/pytorch_model.bin").touch(),
        r"There is .*actor/huggingface/pytorch_model.bin, but only safetensors are read",
    ),
    "nothing": (lambda actor: None, r"verl saved no safetensors in huggingface/ or model/huggingface/"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_checkpoints_without_weights_say_what_they_have(case, step, tmp_path):
    make, message = NOTHING[case]
    model("qwen2").config.save_pretrained(step / "actor/huggingface")
    make(step / "actor")
    with pytest.raises(SourceError, match=rf"no FSDP shards .*{message}"):
        export(step, tmp_path / "out")


def test_the_folder_itself_leads_to_its_parent(step, tmp_path):
    saved = hf_weights.save(model("qwen2"), step)
    with pytest.raises(SourceError, match=rf"weights here are those of {saved.parent}; give that"):
        export(saved, tmp_path / "out")


def test_nothing_is_written_into_such_a_checkpoint(step):
    saved = hf_weights.save(model("qwen2"), step, MEGATRON)
    with pytest.raises(ConfigError, match=r"is in .*global_step_7, which is a checkpoint"):
        places.check_target(saved.parent / "mine", "--output")


# -- changed meanwhile -----------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content_and_not_of_the_place(step, tmp_path):
    saved = hf_weights.save(model("qwen2"), step, max_shard_size="100KB")
    before = open_source(step).fingerprint
    assert before == open_source(shutil.copytree(step, tmp_path / "copy")).fingerprint
    for path in [saved / FILE, saved / INDEX]:
        content = path.read_bytes()
        path.write_bytes(content)
        assert open_source(step).fingerprint != before, f"{path.name} was written again"
        before = open_source(step).fingerprint


def rewrite(path: Path) -> None:
    """Other weights of the same shapes, with the time of the old ones."""
    seen = path.stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


class ThenRewritten:
    """A merge after which somebody writes over a file, in a way that its size and time do not show."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, jobs: Any, progress: Any) -> Any:
        written = LocalRunner(1).run(jobs, progress)
        rewrite(self.path)
        return written


@pytest.mark.parametrize("name", ["qwen2", "turned"])
def test_a_file_that_is_written_over_during_the_export_is_refused(name, step, tmp_path):
    saved = hf_weights.save(model(name), step)
    (tmp_path / "out").mkdir()
    source = open_source(step)
    with pytest.raises(SourceError, match=r"model.safetensors: bytes \d+ to \d+: CRC-32 .* when they were read again"):
        run_export(checkpoint_spec(step, verify=False), tmp_path / "out", ThenRewritten(saved / "model.safetensors"))
    source.check_unchanged()  # which is why the bytes are read again


# -- holds -----------------------------------------------------------------------------------


def exporter(root: Path) -> Exporter:
    settings = load_config({"output_dir": str(root / "exports"), "verify": {"load": False}})
    return Exporter(settings, LocalRunner(1))


@pytest.mark.parametrize("where", [FSDP, MEGATRON, "model/huggingface"])
def test_a_hold_has_all_that_an_export_needs(where, step, tmp_path):
    saved = hf_weights.save(model("moe"), step, where, max_shard_size="50KB")
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    export(step, tmp_path / "expected")
    hold = holds.make_hold(step, STEP, "actor")
    holds.choose(hold, request_for(hold).to_json())
    assert hold.linked
    assert Path(hold.origin) == saved.parent
    shutil.rmtree(step)
    record = export(hold.path, tmp_path / "by hand")
    assert record.step == STEP
    assert_same_model(tmp_path / "by hand", tmp_path / "expected")
    assert exporter(step.parent).export(request_for(hold)).status == "published"
    (version,) = Registry(step.parent / "exports").versions()
    assert_same_model(version.path, tmp_path / "expected")
    assert (version.path / "chat_template.jinja").exists()
    assert version.record.source["path"] == str(saved.parent)
    assert not hold.path.exists()


def test_a_step_that_is_saved_again_after_it_was_chosen_is_refused(step):
    saved = hf_weights.save(model("qwen2"), step)
    hold = holds.make_hold(step, STEP, "actor")
    request = request_for(hold)
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    outcome = exporter(step.parent).export(request)
    assert outcome.status == "failed"
    assert f"the shards of step {STEP} have changed since it was chosen" in outcome.reason


def test_a_step_that_is_not_complete_is_not_held(step):
    saved = hf_weights.save(model("qwen2"), step, MEGATRON)
    (saved.parents[1] / "ckpt_contents.json").unlink()
    with pytest.raises(SourceError, match=r"ckpt_contents.json: not there"):
        holds.make_hold(step, STEP, "actor")
    assert not (step.parent / holds.FOLDER).exists()


@pytest.mark.parametrize("where", [FSDP, MEGATRON])
def test_milestones_of_a_run(where, step):
    """verl has rotated each checkpoint away before its step is judged."""
    root = step.parent
    node = {"output_dir": str(root / "exports"), "verify": {"load": False}, "source": "checkpoint"}
    node["trigger"] = {"best": {"metric": "val/x"}, "on_train_end": True}
    run = RunController(load_config(node), RunInfo(root), LocalExportService)
    run.begin(0, 3)
    for number, value in ((1, 0.5), (2, 0.1), (3, 0.9)):
        folder = root / f"global_step_{number}"
        hf_weights.save(build(QWEN2, "float32", scale=0.05 * number), folder, where, max_shard_size="100KB")
        run.saved(number, folder)
        shutil.rmtree(folder)
        run.logged(number, {"val/x": value})
    run.end(True)
    assert "2 published (v0001-step1, v0002-step3)" in run.drain(120)
    best = Registry(root / "exports").find("best")
    assert best.step == 3
    expected = build(QWEN2, "float32", scale=0.15).state_dict()
    found = tensors(best.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].to(torch.bfloat16)) for name, tensor in found.items())
    assert not list((root / holds.FOLDER).glob("step_*"))


def test_versions_of_a_registry_follow_one_another(step, tmp_path):
    registry = Registry.create(tmp_path / "exports")
    for number in (1, 2):
        folder = step.with_name(f"global_step_{number}")
        hf_weights.save(build(QWEN2, "float32", scale=0.05 * number), folder, MEGATRON)
        export_to_registry(checkpoint_spec(folder, verify=False), registry, LocalRunner(1))
    assert [v.name for v in registry.versions()] == ["v0001-step1", "v0002-step2"]
    assert os.readlink(registry.root / "latest") == "v0002-step2"


def test_times_that_contradict_one_save_are_noted(step, tmp_path):
    saved = hf_weights.save(model("qwen2"), step, max_shard_size="100KB")
    (step.parent / "latest_checkpointed_iteration.txt").write_text("3")
    seen = (saved / FILE).stat()
    os.utime(saved / FILE, (seen.st_atime, seen.st_mtime - 7200))
    notes = export(step, tmp_path / "out").notes
    assert any(f"after {FILE}: they may be of different saves" in note for note in notes)
    assert any("latest_checkpointed_iteration.txt says 3" in note for note in notes)

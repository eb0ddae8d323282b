"""The examples of docs/extending.md: each seam takes a second, tiny implementation."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.exports import assert_same_model, export, tensors
from tests.support.repository import ROOT
from verl_autoexport.errors import ConfigError, PlanError
from verl_autoexport.merge.job import MergeJob
from verl_autoexport.merge.plan import Output, make_plan, whole
from verl_autoexport.registry.store import Registry
from verl_autoexport.sources import formats
from verl_autoexport.sources.formats import open_source

PAGE = ROOT / "docs" / "extending.md"
MAX_LINES = 40


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The examples as a package that is installed, in this process and in those that it starts."""
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine.py").write_text("\n\n".join(blocks("python")))
    points = "\n".join(block.replace("project.entry-points.", "").replace('"', "") for block in blocks("toml"))
    (site / "mine-1.0.dist-info/entry_points.txt").write_text(points)
    (site / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("COPY_TO", str(tmp_path / "elsewhere"))
    monkeypatch.syspath_prepend(site)
    formats.known_formats.cache_clear()
    yield importlib.import_module("mine")
    del sys.modules["mine"]
    formats.known_formats.cache_clear()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_examples_are_short():
    sizes = [len(block.splitlines()) for block in blocks("python")]
    assert len(sizes) == 6
    assert max(sizes) <= MAX_LINES


def one_file(checkpoint: Path, target: Path) -> Path:
    """The same weights as a checkpoint of the example's format."""
    shutil.copytree(checkpoint / "actor/huggingface", target / "actor/huggingface")
    save_file(tensors(checkpoint / "reference"), target / "actor/weights.safetensors")
    return target


def test_a_format(mine, checkpoint, tmp_path):
    made = one_file(checkpoint("even"), tmp_path / "global_step_3")
    record = export(made, tmp_path / "out", verify=True)
    assert record.step == 3
    assert "all" in record.verification["logits"]["detail"], "verification reads it a second time"
    export(checkpoint("even"), tmp_path / "same")
    assert_same_model(tmp_path / "out", tmp_path / "same")


def packed(checkpoint: Path, target: Path) -> Path:
    """The same weights as the example's model has them in memory."""
    one_file(checkpoint, target)
    weights = tensors(checkpoint / "reference")
    for name in [name for name in weights if ".gate_proj." in name]:
        parts = weights.pop(name), weights.pop(name.replace(".gate_", ".up_"))
        weights[name.replace(".gate_", ".gate_up_")] = torch.cat(parts)
    save_file(weights, target / "actor/weights.safetensors")
    path = target / "actor/huggingface/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "packed_qwen2"}))
    return target


def test_a_skeleton(mine, checkpoint, tmp_path):
    made = packed(checkpoint("even"), tmp_path / "global_step_3")
    export(checkpoint("even"), tmp_path / "same")
    for base in (None, str(tmp_path / "same")):
        record = export(made, tmp_path / f"out{base is None}", verify=True, base_model=base)
        assert_same_model(tmp_path / f"out{base is None}", tmp_path / "same")
        assert record.architectures == ("Qwen2ForCausalLM",)
        found = {name: record.verification[name]["status"] for name in ("contract", "load", "generate", "logits")}
        compared = "skipped" if base is None else "passed"
        assert found == {"contract": compared, "load": "passed", "generate": "passed", "logits": "skipped"}


UNKNOWN = """
import mine
from transformers import AutoConfig, Qwen2Config

class Config(Qwen2Config):
    model_type = "packed_qwen2"

AutoConfig.register("packed_qwen2", Config)

class Unknown(mine.PackedQwen2):
    name = "PackedForCausalLM"

    def __init__(self, directory, dtype, trust_remote_code):
        super().__init__(directory, dtype, trust_remote_code)
        self.config = Config.from_pretrained(directory)
"""


def test_a_model_that_transformers_does_not_know_is_exported_but_not_loaded(mine, checkpoint, tmp_path):
    (tmp_path / "site/other.py").write_text(UNKNOWN)
    register(tmp_path, "mine:PackedQwen2", "other:Unknown")
    record = export(packed(checkpoint("even"), tmp_path / "global_step_3"), tmp_path / "out", verify=True)
    export(checkpoint("even"), tmp_path / "same")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "same").keys()
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert (found["model_type"], found["architectures"]) == ("packed_qwen2", ["PackedForCausalLM"])
    assert {record.verification[name]["status"] for name in ("load", "generate", "logits")} == {"skipped"}
    assert "architecture PackedForCausalLM is unknown to transformers" in record.verification["load"]["detail"]


def test_a_skeleton_that_does_not_fit_is_refused(mine, checkpoint, tmp_path):
    made = packed(checkpoint("even"), tmp_path / "global_step_3")
    path = made / "actor/huggingface/config.json"
    path.write_text(path.read_text().replace('"intermediate_size": ', '"intermediate_size": 1'))
    with pytest.raises(PlanError, match=r"not a complete Qwen2ForCausalLM: .* wrong shape or kind .*gate_up_proj"):
        export(made, tmp_path / "out")
    path.write_text(path.read_text().replace('"hidden_size": ', '"hidden_size": "x", "y": '))
    with pytest.raises(PlanError, match=r"mine.PackedQwen2, an entry point of verl_autoexport.skeletons, cannot"):
        export(made, tmp_path / "out")


def register(tmp_path: Path, before: str, after: str) -> None:
    points = tmp_path / "site/mine-1.0.dist-info/entry_points.txt"
    points.write_text(points.read_text().replace(before, after))


def test_a_transform(mine, tmp_path):
    folder = tmp_path / "global_step_1"
    folder.mkdir()
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    save_file({"a": a, "b": b}, folder / "weights.safetensors")
    manifest = open_source(folder).manifest()
    outputs = [Output("a", (3, 4), "float32", whole("a", (3, 4)))]
    plan = make_plan(manifest, outputs, 10**9, {"a": mine.Average("b")})
    (file,) = plan.files
    written = MergeJob(file, manifest, tmp_path / file.name, 1 << 20).run()
    assert torch.equal(tensors(tmp_path)["a"], (a + b) / 2)
    assert written.changed == written.affected == {"a"}


def test_a_trainer_with_a_service_and_a_publisher(mine, checkpoint, tmp_path, capsys):
    def save(target: Path) -> Path:
        return one_file(checkpoint("even"), target)

    mine.LoopTrainer(tmp_path, 3).train(save, {"at_steps": [2]})
    assert "verl_autoexport: 2 published (v0001-step2, v0002-step3)" in capsys.readouterr().out
    registry = Registry(tmp_path / "exports")
    for version in registry.versions():
        assert_same_model(tmp_path / "elsewhere" / version.name, version.path)
    delivered = [e for e in registry.journal_entries()[0] if e["event"] == "delivered"]
    assert [(e["version"], e["publisher"]) for e in delivered] == [("v0001-step2", "copy"), ("v0002-step3", "copy")]


def test_a_publisher_that_fails_is_noted_and_stops_nothing(mine, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COPY_TO", "/proc/nowhere")
    mine.LoopTrainer(tmp_path, 2).train(lambda target: one_file(checkpoint("even"), target), {"at_steps": [1]})
    registry = Registry(tmp_path / "exports")
    assert [v.step for v in registry.versions()] == [1, 2]
    refused = [e for e in registry.journal_entries()[0] if e["event"] == "undelivered"]
    assert [(e["version"], e["publisher"]) for e in refused] == [("v0001-step1", "copy"), ("v0002-step2", "copy")]
    assert all("/proc/nowhere" in e["reason"] for e in refused)


def test_a_package_that_cannot_be_used_is_named(mine, tmp_path):
    register(tmp_path, "mine:OneFile", "mine:NoSuchThing")
    with pytest.raises(ConfigError, match=r"entry point one_file = mine:NoSuchThing .* cannot be used: AttributeError"):
        formats.known_formats()

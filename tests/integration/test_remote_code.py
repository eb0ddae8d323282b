"""Models whose code lies in the checkpoint: exported with it, and run only if that is asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.custom_code import AUTO_MAP, FILES, add_code
from tests.support.published import make_base, make_tokenizer, read_json
from tests.support.repository import environment
from verl_autoexport import AutoExportError, export_checkpoint
from verl_autoexport.errors import PlanError

CONFIGURATION = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"

    def __init__(self, vocab_size=11, hidden_size=6, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_tiny import TinyConfig

class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))
"""


@pytest.fixture
def remote_checkpoint(tmp_path) -> Path:
    model_dir = tmp_path / "global_step_7" / "actor" / "huggingface"
    model_dir.mkdir(parents=True)
    (model_dir / "configuration_tiny.py").write_text(CONFIGURATION)
    (model_dir / "modeling_tiny.py").write_text(MODELING)
    auto_map = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    config = {"model_type": "tiny_remote", "architectures": ["TinyForCausalLM"], "auto_map": auto_map}
    (model_dir / "config.json").write_text(json.dumps(config | {"vocab_size": 11, "hidden_size": 6}))
    torch.manual_seed(0)
    shapes = {"embed.weight": (11, 6), "head.weight": (11, 6), "head.bias": (11,)}
    torch.save({k: torch.randn(s) for k, s in shapes.items()}, model_dir.parent / "model_world_size_1_rank_0.pt")
    return tmp_path / "global_step_7"


def test_remote_code_is_exported_and_loads_if_trusted(remote_checkpoint, tmp_path):
    record = export_checkpoint(remote_checkpoint, tmp_path / "out", trust_remote_code=True)
    assert record.step == 7
    assert record.verification["load"]["status"] == "passed"
    assert record.verification["generate"]["status"] == "passed"
    assert (tmp_path / "out" / "modeling_tiny.py").read_text() == MODELING
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_tiny.TinyForCausalLM"
    source = torch.load(remote_checkpoint / "actor" / "model_world_size_1_rank_0.pt")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, source[name].bfloat16())


def test_remote_code_does_not_run_unasked(remote_checkpoint, tmp_path):
    marker = tmp_path / "ran"
    for name in ("configuration_tiny.py", "modeling_tiny.py"):
        path = remote_checkpoint / "actor" / "huggingface" / name
        path.write_text(f"open({str(marker)!r}, 'w').close()\n" + path.read_text())
    with pytest.raises(AutoExportError, match="trust_remote_code"):
        export_checkpoint(remote_checkpoint, tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


# -- sharded, the class is one of torch's -------------------------------------------------------


@pytest.fixture(scope="module", params=["fsdp2", "fsdp"])
def sharded(request, tmp_path_factory) -> tuple[Path, Path]:
    """A base with its own code, and the directory of the checkpoint and the live files of a run that trained it."""
    base = add_code(make_tokenizer(make_base(tmp_path_factory.mktemp("base") / "own")))
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "tests.support.custom_code", str(base), str(out), request.param]
    subprocess.run(command, env=environment(), check=True)
    return base, out


def test_the_code_of_a_live_run_is_that_of_the_class_before_it_was_sharded(sharded):
    _, out = sharded
    live = out / "live/huggingface"
    code = {p.relative_to(live).as_posix(): p.read_text() for p in live.rglob("*.py")}
    assert code == {name: text for name, text in FILES.items() if name != "unrelated.py"}
    assert read_json(live / "config.json")["auto_map"] == AUTO_MAP


def test_a_checkpoint_with_code_of_torchs_is_exported_with_the_bases(sharded, tmp_path):
    base, out = sharded
    record = export_checkpoint(out / "global_step_2", tmp_path / "out", base_model=str(base), trust_remote_code=True)
    assert record.verification["logits"]["status"] == "passed", record.verification
    assert not list((tmp_path / "out").rglob("_f*.py"))
    for name in FILES.keys() - {"unrelated.py"}:
        assert (tmp_path / "out" / name).read_text() == FILES[name]
    assert read_json(tmp_path / "out/config.json")["auto_map"] == AUTO_MAP


def test_without_its_code_a_checkpoint_is_refused_before_anything_is_written(sharded, tmp_path):
    _, out = sharded
    made = shutil.copytree(out / "global_step_2", tmp_path / "global_step_2")
    for path in (made / "actor/huggingface").rglob("modeling_own.py"):
        path.unlink()
    with pytest.raises(PlanError, match=r"auto_map leads to .*OwnForCausalLM.*--base-model"):
        export_checkpoint(made, tmp_path / "out", trust_remote_code=True, verify=False)
    assert not (tmp_path / "out").exists()

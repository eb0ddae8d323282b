"""Models whose code lies in the checkpoint: exported with it, and run only if that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from verl_autoexport import AutoExportError, export_checkpoint

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

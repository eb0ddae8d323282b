"""Exports read by engines' older transformers (4.57): config, tokenizer, processor and model are those of the run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from tests.support.assets import STYLES, make_processor, put
from tests.support.published import (
    LLAMA,
    SMALL,
    START,
    STOP,
    make_base,
    make_run,
    make_tokenizer,
    read_json,
    write_json,
)
from tests.support.repository import ROOT
from verl_autoexport import export_checkpoint

pytestmark = pytest.mark.full

READER = ROOT / ".venv-reader/bin/python"
TEXT = "Hello, wörld! 12345\n\t<|im_start|>user\n漢字 🙂<|im_end|>"
READ = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
directory, text, what = sys.argv[1:4]
found = {}
tokenizer = AutoTokenizer.from_pretrained(directory)
found["ids"] = [tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]]
found["special"] = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
found["template"] = tokenizer.chat_template
if what == "processor":
    processor = AutoProcessor.from_pretrained(directory)
    found["processor"] = [processor.image_processor.size, processor.image_processor.image_mean, processor.chat_template]
if what == "model":
    config = AutoConfig.from_pretrained(directory)
    found["eos"] = config.eos_token_id
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    found["problems"] = {k: sorted(map(str, v)) for k, v in info.items() if v}
    found["inv_freq"] = model.model.rotary_emb.inv_freq.tolist()
    with torch.inference_mode():
        found["logits"] = model(torch.arange(1, 9)[None]).logits.flatten().tolist()
print(json.dumps(found))
"""


def read(directory: Path, what: str = "tokenizer") -> dict[str, Any]:
    """What transformers 4.57 makes of it, in its own environment (`make test-full` sets it up)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(READER), "-c", READ, str(directory), TEXT, what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def expect(tokenizer: Any) -> dict[str, Any]:
    return {
        "ids": [tokenizer(TEXT)["input_ids"], tokenizer(TEXT, add_special_tokens=False)["input_ids"]],
        "special": {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str) and v},
        "template": tokenizer.chat_template,
    }


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("eos", [None, STOP])
@pytest.mark.parametrize("style", STYLES)
def test_tokenizers(style, eos, with_base, tmp_path):
    base = make_tokenizer(make_base(tmp_path / "base", LLAMA if "llama" in style else SMALL), **STYLES[style])
    tokenizer = AutoTokenizer.from_pretrained(base)
    if eos:
        tokenizer.eos_token, tokenizer.chat_template = eos, "{{ messages }} of the run"
    run = make_run(tmp_path / "run", base, tokenizer)
    export_checkpoint(run, tmp_path / "out", base_model=str(base) if with_base else None)
    found = read(tmp_path / "out")
    assert found == (read(base) if with_base and not eos else expect(tokenizer))


ROPES: dict[str, dict[str, Any]] = {
    "as it was": {},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "theta": {"rope_theta": 5e5},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", [SMALL, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize("rope", ROPES)
def test_models(rope, architecture, tmp_path):
    base = make_tokenizer(make_base(tmp_path / "base", architecture))
    changed = tmp_path / "changed"
    changed.mkdir()
    write_json(changed / "config.json", read_json(base / "config.json") | ROPES[rope])
    config = AutoConfig.from_pretrained(changed)
    run = make_run(tmp_path / "run", base, AutoTokenizer.from_pretrained(base), config)
    record = export_checkpoint(run, tmp_path / "out", base_model=str(base))
    assert record.verification["logits"]["status"] == "passed"
    found = read(tmp_path / "out", "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert found["problems"] == {}
    assert torch.equal(torch.tensor(found["inv_freq"]), model.model.rotary_emb.inv_freq)
    with torch.inference_mode():
        ours = model(torch.arange(1, 9)[None]).logits.flatten()
    torch.testing.assert_close(torch.tensor(found["logits"]), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [False, True])
def test_processors(changed, tmp_path):
    base = make_processor(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    if changed:
        processor.image_processor.size = {"shortest_edge": 14}
        processor.chat_template = processor.tokenizer.chat_template = "of the run"
        processor.tokenizer.pad_token = START
    processor.save_pretrained(tmp_path / "run")
    write_json(tmp_path / "run/config.json", read_json(base / "config.json"))
    put(tmp_path / "run", tmp_path / "out", base)
    found = read(tmp_path / "out", "processor")
    image = processor.image_processor
    assert found.pop("processor") == [dict(image.size), list(image.image_mean), processor.chat_template]
    assert found == expect(processor.tokenizer)

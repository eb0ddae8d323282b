"""Tiny models as the hub has them, in files that transformers 4 wrote, and checkpoints of runs that began with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tests.support.sharding import build

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
END, START, STOP = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IDS = {END: 256, START: 257, STOP: 258}
SMALL = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 272, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
LLAMA = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def make_tokenizer(
    directory: Path, kind: str = "Qwen2Tokenizer", eos: str = END, pad: str | None = END, template: Any = TEMPLATE,
    bos: str | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """A byte-level tokenizer; `kind` is its `tokenizer_class`. With `bos` it begins every text with that."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, IDS[bos])]
        )
    inner.save(str(directory / "tokenizer.json"))
    tokens = {"eos_token": eos, "pad_token": pad, "bos_token": bos, "unk_token": None}
    config = {
        "added_tokens_decoder": {str(IDS[text]): _token(text) | {"special": True} for text in SPECIAL},
        "additional_special_tokens": [START, STOP], "model_max_length": 4096, "tokenizer_class": kind,
    }  # fmt: skip
    config |= tokens | settings | ({} if template is None else {"chat_template": template})
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", {key: _token(text) for key, text in tokens.items() if text})
    write_json(directory / "vocab.json", vocab)
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return directory


def _token(text: str) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def make_base(directory: Path, config: Mapping[str, Any] = SMALL, **put: Any) -> Path:
    """Weights, config and generation config of a published model; `put` into its `config.json`."""
    build(dict(config), "bfloat16").save_pretrained(directory)
    spell_old(directory / "config.json", **put)
    write_json(directory / "generation_config.json", {"eos_token_id": 256, "do_sample": True, "temperature": 0.6})
    return directory


def spell_old(path: Path, **put: Any) -> None:
    """Rewrite a `config.json` as transformers 4 wrote it."""
    config = read_json(path)
    for node in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in node:
            node["torch_dtype"] = node.pop("dtype")
        if rope := node.pop("rope_parameters", None):
            node["rope_theta"] = rope.pop("rope_theta", 10000.0)
            if rope.get("rope_type", "default") != "default":
                node["rope_scaling"] = rope
    write_json(path, config | {"transformers_version": "4.51.0"} | put)


def make_run(directory: Path, base: Path, processing: Any = None, config: Any = None, **changed: Any) -> Path:
    """The checkpoint of a run of one rank that trained `base`, as verl lays it out; `changed` in its configuration.

    `processing`: the tokenizer or processor that the run saves. Returns `global_step_3`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = config or AutoConfig.from_pretrained(base)
    for key, value in changed.items():
        setattr(config, key, value)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_pretrained(base, config=config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    actor = directory / "global_step_3/actor"
    (actor / "huggingface").mkdir(parents=True)
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")
    write_json(actor / "fsdp_config.json", {"FSDP_version": 2, "world_size": 1})
    config.save_pretrained(actor / "huggingface")
    if processing is not None:
        processing.save_pretrained(actor / "huggingface")
    return actor.parent


def saved(run: Path) -> Path:
    """The directory of a checkpoint with what is not the shards."""
    return run / "actor/huggingface"

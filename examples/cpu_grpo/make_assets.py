"""Write a tiny random Qwen2 model with tokenizer to OUTDIR/model, and data to OUTDIR/*.parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HEAD_DIM = 32  # the smallest that vLLM serves
VOCAB_SIZE = 272
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, no merges."""
    symbols = [*sorted(ByteLevel.alphabet()), *SPECIAL_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer, *, hidden_size: int, layers: int, tied: bool) -> Qwen2ForCausalLM:
    """Random fp32 weights, the same for the same arguments."""
    heads = hidden_size // HEAD_DIM
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.float32)


def make_rows(count: int, split: str) -> pd.DataFrame:
    """Prompts like `3+1=` in verl's format."""
    rows = []
    for i in range(count):
        a, b = i % 10, i * 7 % 10
        rows.append(
            {
                "data_source": "tiny",
                "prompt": [{"role": "user", "content": f"{a}+{b}="}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"split": split, "index": i},
            }
        )
    return pd.DataFrame(rows)


def make_conversations(count: int) -> pd.DataFrame:
    """The same sums with their answers, in verl's format for SFT."""
    sums = ((i % 10, i * 7 % 10) for i in range(count))
    return pd.DataFrame(
        {
            "messages": [
                [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]
                for a, b in sums
            ]
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--tied", action="store_true", help="tie the output head to the embeddings")
    parser.add_argument("--hidden-size", type=int, default=64, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    if args.hidden_size < HEAD_DIM or args.hidden_size % HEAD_DIM:
        parser.error(f"--hidden-size: expected a multiple of {HEAD_DIM}, found {args.hidden_size}")

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden_size=args.hidden_size, layers=args.layers, tied=args.tied)
    args.outdir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.outdir / "model")
    tokenizer.save_pretrained(args.outdir / "model")
    make_rows(64, "train").to_parquet(args.outdir / "train.parquet")
    make_rows(8, "test").to_parquet(args.outdir / "test.parquet")
    make_conversations(64).to_parquet(args.outdir / "sft_train.parquet")
    make_conversations(8).to_parquet(args.outdir / "sft_test.parquet")
    print(f"{args.outdir}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

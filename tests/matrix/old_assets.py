"""The model and the data of the example, with a tokenizer that any transformers from 4.51 on can make. usage: OUTDIR"""

from __future__ import annotations

import sys
from pathlib import Path

from make_assets import CHAT_TEMPLATE, SPECIAL_TOKENS, make_conversations, make_model, make_rows  # of the example
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL_TOKENS]
    plain = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    end, _, stop = SPECIAL_TOKENS
    tokens = {"eos_token": stop, "pad_token": end, "unk_token": end}
    made = PreTrainedTokenizerFast(tokenizer_object=plain, additional_special_tokens=[SPECIAL_TOKENS[1]], **tokens)
    made.chat_template = CHAT_TEMPLATE
    return made


def main(folder: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer, hidden_size=64, layers=2, tied=False).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_rows(64, "train").to_parquet(folder / "train.parquet")
    make_rows(8, "test").to_parquet(folder / "test.parquet")
    make_conversations(64).to_parquet(folder / "sft_train.parquet")
    make_conversations(8).to_parquet(folder / "sft_test.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

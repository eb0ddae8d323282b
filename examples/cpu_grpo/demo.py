"""Show what a run has exported: the table of versions, and a reply by the best of them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PROMPT = "3+1="


def reply(model_dir: Path, prompt: str) -> str:
    """One greedy generation, with nothing but the published directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="the output directory of the exports")
    root = parser.parse_args().root
    listing = subprocess.run([sys.executable, "-m", "verl_autoexport", "ls", str(root)], check=False)
    if listing.returncode:
        return listing.returncode
    best = root / "best"
    if not best.exists():
        print(f"{best}: expected a published version, found none; see the run's last line for why", file=sys.stderr)
        return 1
    print(f"\n{best} is {best.resolve().name}; greedy, in bfloat16, it answers {PROMPT!r} with {reply(best, PROMPT)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

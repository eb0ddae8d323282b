"""Run in a fresh process: load a published directory as a user would, and generate a little.

`python -m verl_autoexport.verify.load_in_child DIR` prints one JSON line `{"load": {"status", "detail"},
"generate": {…}, "logits": {…}, "assets": {…}}` and exits 0 whatever it found; any other exit means
that the process itself did not get that far.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEW_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--no-generate", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--external-lib")
    parser.add_argument("--adapter-of", type=Path, help="DIR is a PEFT adapter of the model whose config is there")
    parser.add_argument("--shards", type=Path, help="the rank files that DIR was made of: its logits must be theirs")
    parser.add_argument("--lora", type=json.loads, help="the adapter in the shards: its configuration, as JSON")
    parser.add_argument("--saved", type=Path, help="the directory with the config.json that belongs to the shards")
    parser.add_argument("--base", type=Path, help="the base model, where the shards hold the adapter only")
    parser.add_argument("--assets", type=json.loads, help="JSON: directories that tokenizer and processor must equal")
    parser.add_argument("--no-load", metavar="REASON", help="look at the assets only")
    parser.add_argument("--carried", action="store_true", help="stdin names tensors that the class does not read")
    args = parser.parse_args()
    if args.external_lib:
        for module in args.external_lib.split(","):
            importlib.import_module(module.strip())
    result: dict[str, Any] = {}
    if args.assets:
        result["assets"] = check_assets(args.directory, args.assets, args.trust_remote_code)
    if args.no_load:
        skipped = {"status": "skipped", "detail": args.no_load}
        result |= dict.fromkeys(("load", "generate", *(["logits"] if args.shards else [])), skipped)
    elif args.adapter_of:
        result |= _check_adapter(args.directory, args.adapter_of, args.trust_remote_code)
    else:
        result |= _check_model(args)
    print(json.dumps(result))


def _processors(directory: Path, wanted: Path, trust_remote_code: bool, in_files: bool) -> tuple[Any, Any]:
    """What is to be compared of both: where the wanted one, or its tokenizer, cannot be loaded here, their files."""
    from verl_autoexport.model import asset_facts

    if in_files:
        return asset_facts.processor_files(directory), asset_facts.processor_files(wanted)
    try:
        expected = asset_facts.processor_facts(wanted, trust_remote_code)
    except asset_facts.Unreadable:
        return asset_facts.processor_files(directory), asset_facts.processor_files(wanted)
    return asset_facts.processor_facts(directory, trust_remote_code), expected


def _check_model(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    try:
        carried = sys.stdin.read().split() if args.carried else []
        model = load_model(args.directory, args.trust_remote_code, carried)
        result["load"] = {
            "status": "passed",
            "detail": f"{type(model).__name__}, no key missing, unexpected or renewed"
            + (f", but for the {len(carried)} carried over from the base" if carried else ""),
        }
    except Exception as e:  # noqa: BLE001 - a model's own code runs here; the finding is the output
        result["load"] = {"status": "failed", "detail": f"{type(e).__name__}: {e}"}
    else:
        result["generate"] = _skip() if args.no_generate else generate(model)
        if args.shards:
            result["logits"] = _skip() if args.no_generate else _compare(model, args)
    return result


def check_assets(directory: Path, wanted: dict[str, str | None], trust_remote_code: bool) -> dict[str, str]:
    """The written tokenizer, processor and templates against those that they were made of."""
    from verl_autoexport.model import asset_facts

    tokenizer, processor, template = (
        Path(found) if (found := wanted[key]) else None for key in ("tokenizer", "processor", "processor_template")
    )
    equal, differ, unread = [], [], []
    try:
        expected = asset_facts.tokenizer_facts(tokenizer, trust_remote_code) if tokenizer else {}
    except asset_facts.Unreadable as e:
        expected, tokenizer = {}, None
        unread.append(str(e))
    try:
        if tokenizer:
            differ += asset_facts.differences(asset_facts.tokenizer_facts(directory, trust_remote_code), expected)
            equal.append(f"{expected['class']} of {len(expected['ids of a probe'][0])} probe tokens")
        if processor:
            found, settings = _processors(directory, processor, trust_remote_code, bool(unread))
            differ += asset_facts.differences(found, settings)
            shown = asset_facts.processor_template(template) if template else expected.get("chat template")
            if template or tokenizer:
                mine = asset_facts.processor_template(directory)
                differ += asset_facts.differences({"processor's template": mine}, {"processor's template": shown})
            equal.append(f"{found.get('class', 'settings of the')} processor")
    except Exception as e:  # noqa: BLE001 - see main; a version whose tokenizer does not load is of no use
        return {"status": "failed", "detail": f"{type(e).__name__}: {e}"}
    if differ:
        return {"status": "failed", "detail": "; ".join(differ)}
    if not equal:
        return {"status": "skipped", "detail": "; ".join(unread) or "there is no tokenizer"}
    return {"status": "passed", "detail": f"equal: {', '.join(equal)}"}


def load_model(directory: Path, trust_remote_code: bool, carried: Sequence[str] = ()) -> Any:
    from transformers import GenerationConfig

    from verl_autoexport.model.conversion import Loading
    from verl_autoexport.model.skeleton import load_config, model_class

    cls = model_class(load_config(directory, trust_remote_code), directory, trust_remote_code)
    model, info = cls.from_pretrained(
        directory, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code, local_files_only=True,
        generation_config=GenerationConfig(),  # the model's own may ask for what cannot be run, or loaded, here
    )  # fmt: skip
    if carried:
        loading = Loading(model)
        info["unexpected_keys"] = set(info["unexpected_keys"]).difference(*map(loading.unexpected, carried))
    problems = {k: sorted(map(str, v))[:8] for k, v in info.items() if v}
    if problems:
        raise ValueError(f"transformers loads it, but reports {problems}")
    return model.eval()


def _check_adapter(directory: Path, base: Path, trust_remote_code: bool) -> dict[str, dict[str, str]]:
    """Put the adapter on the base model: every tensor must find its place and arrive unchanged.

    The base's own weights are not needed, so its memory is allocated and never touched.
    """
    generate = {"status": "skipped", "detail": "an adapter alone does not generate"}
    if importlib.util.find_spec("peft") is None:
        return {"load": {"status": "skipped", "detail": "peft is not installed"}, "generate": generate}
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    from verl_autoexport.model.skeleton import build_skeleton

    try:
        skeleton = build_skeleton(base, "source", trust_remote_code=trust_remote_code).to_empty(device="cpu")
        model = PeftModel.from_pretrained(skeleton, str(directory))
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        written = load_file(directory / "adapter_model.safetensors")
        if differ := sorted(found.keys() ^ written.keys()):
            raise ValueError(f"PEFT expects other tensors than the file holds: {differ[:8]}")
        if differ := [k for k, v in written.items() if not found[k].to(v.dtype).equal(v)]:
            raise ValueError(f"PEFT did not load {differ[:8]}")
    except Exception as e:  # noqa: BLE001 - see main
        return {"load": {"status": "failed", "detail": f"{type(e).__name__}: {e}"}}
    detail = f"PeftModel of {type(skeleton).__name__}, {len(written)} tensors in place"
    return {"load": {"status": "passed", "detail": detail}, "generate": generate}


def _compare(model: Any, args: argparse.Namespace) -> dict[str, str]:
    from verl_autoexport.verify.against_shards import compare

    if args.lora and importlib.util.find_spec("peft") is None:
        return {"status": "skipped", "detail": "peft, which would merge the adapter by another path, is not installed"}
    try:
        found = compare(model, args.shards, args.saved, args.lora, args.base, args.trust_remote_code)
        return {"status": "passed", "detail": found}
    except Exception as e:  # noqa: BLE001 - see main
        return {"status": "failed", "detail": f"{type(e).__name__}: {e}"}


def generate(model: Any) -> dict[str, str]:
    import torch

    from verl_autoexport.verify.against_shards import CannotRun, fixed_input, forward

    try:
        with torch.inference_mode():
            if not torch.isfinite(forward(model)).all():
                raise ValueError("the logits of a forward pass are not finite")
            ids = fixed_input(model)
            if not model.can_generate():
                return {"status": "passed", "detail": f"{type(model).__name__} does not generate; forward pass finite"}
            out = model.generate(ids, generation_config=_neutral(model.config), max_new_tokens=NEW_TOKENS)
    except CannotRun as e:  # says nothing of the weights: those are compared with the shards
        return {"status": "skipped", "detail": f"{type(model).__name__} does not run on token ids alone here: {e}"}
    except Exception as e:  # noqa: BLE001 - see main
        return {"status": "failed", "detail": f"{type(e).__name__}: {e}"}
    return {"status": "passed", "detail": f"greedy tokens {out[0, ids.shape[1] :].tolist()}"}


def _neutral(config: Any) -> Any:
    """Greedy, whatever the model's own settings ask for: some need a tokenizer, a library or several beams."""
    from transformers import GenerationConfig

    text = config.get_text_config(decoder=True)
    start = {key: getattr(text, key, None) for key in ("decoder_start_token_id", "bos_token_id")}
    return GenerationConfig(do_sample=False, pad_token_id=0, **start)


def _skip() -> dict[str, str]:
    return {"status": "skipped", "detail": "not asked for"}


if __name__ == "__main__":
    main()

"""Run in a fresh process: load a published directory as a user would, and generate a little.

`python -m verl_autoexport.export.load_check DIR` prints one JSON line
`{"load": {"status", "detail"}, "generate": {…}, "logits": {…}}` and exits 0 whatever it found; any other
exit means that the process itself did not get that far.
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
    parser.add_argument("--base", type=Path, help="the base model, where the shards hold the adapter only")
    parser.add_argument("--carried", action="store_true", help="stdin names tensors that the class does not read")
    args = parser.parse_args()
    if args.external_lib:
        for module in args.external_lib.split(","):
            importlib.import_module(module.strip())
    if args.adapter_of:
        print(json.dumps(_check_adapter(args.directory, args.adapter_of, args.trust_remote_code)))
        return
    result: dict[str, Any] = {}
    try:
        carried = sys.stdin.read().split() if args.carried else []
        model = _load(args.directory, args.trust_remote_code, carried)
        result["load"] = {
            "status": "passed",
            "detail": f"{type(model).__name__}, no key missing, unexpected or renewed"
            + (f", but for the {len(carried)} carried over from the base" if carried else ""),
        }
    except Exception as e:  # noqa: BLE001 - a model's own code runs here; the finding is the output
        result["load"] = {"status": "failed", "detail": f"{type(e).__name__}: {e}"}
    else:
        result["generate"] = _skip() if args.no_generate else _generate(model)
        if args.shards:
            result["logits"] = _skip() if args.no_generate else _compare(model, args)
    print(json.dumps(result))


def _load(directory: Path, trust_remote_code: bool, carried: Sequence[str]) -> Any:
    from verl_autoexport.export.naming import Loading, load_config, model_class

    cls = model_class(load_config(directory, trust_remote_code), directory, trust_remote_code)
    model, info = cls.from_pretrained(
        directory, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code, local_files_only=True
    )
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

    from verl_autoexport.export.naming import build_skeleton

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
    from verl_autoexport.export.cross_check import compare

    if args.lora and importlib.util.find_spec("peft") is None:
        return {"status": "skipped", "detail": "peft, which would merge the adapter by another path, is not installed"}
    try:
        return {"status": "passed", "detail": compare(model, args.shards, args.lora, args.base, args.trust_remote_code)}
    except Exception as e:  # noqa: BLE001 - see main
        return {"status": "failed", "detail": f"{type(e).__name__}: {e}"}


def _generate(model: Any) -> dict[str, str]:
    import torch

    from verl_autoexport.export.cross_check import CannotRun, fixed_input, forward

    try:
        with torch.inference_mode():
            if not torch.isfinite(forward(model)).all():
                raise ValueError("the logits of a forward pass are not finite")
            ids = fixed_input(model)
            if not model.can_generate():
                return {"status": "passed", "detail": f"{type(model).__name__} does not generate; forward pass finite"}
            out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    except CannotRun as e:  # says nothing of the weights: those are compared with the shards
        return {"status": "skipped", "detail": f"{type(model).__name__} does not run on token ids alone here: {e}"}
    except Exception as e:  # noqa: BLE001 - see main
        return {"status": "failed", "detail": f"{type(e).__name__}: {e}"}
    return {"status": "passed", "detail": f"greedy tokens {out[0, ids.shape[1] :].tolist()}"}


def _skip() -> dict[str, str]:
    return {"status": "skipped", "detail": "not asked for"}


if __name__ == "__main__":
    main()

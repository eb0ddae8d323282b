"""Runs in a fresh process: loads a published directory as a user would, and generates a little.

`python -m verl_autoexport.verify.load_in_child FILE` takes a `LoadRequest` as JSON on stdin and writes one
result for each check into FILE. It exits 0 whatever the results are; any other exit code means that the process
itself failed before.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.model import asset_facts, transformers_api
from verl_autoexport.model.asset_facts import AssetLoader
from verl_autoexport.model.model_class import load_class, load_config
from verl_autoexport.model.skeleton import import_external, registered
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton
from verl_autoexport.verify.checks import LoadRequest
from verl_autoexport.verify.result import CheckResult, failed, passed, skipped

NEW_TOKENS = 8
_NOT_ASKED_FOR = skipped("not asked for")


def main() -> None:
    request = LoadRequest(**json.load(sys.stdin))
    import_external(request.external_lib)
    directory, results = Path(request.directory), {}
    if request.assets:
        results["assets"] = check_assets(directory, request.assets, AssetLoader(request.trust_remote_code))
    if reason := request.not_loaded or _unknown(request):
        names = ("load", "generate", *(["logits"] if request.shards else []))
        results |= dict.fromkeys(names, skipped(reason))
    elif request.adapter_of:
        results |= _check_adapter(request, Path(request.adapter_of))
    else:
        results |= _check_model(request)
    Path(sys.argv[1]).write_text(json.dumps({name: r.to_json() for name, r in results.items()}), encoding="utf-8")


def _unknown(request: LoadRequest) -> str:
    """The reason why transformers cannot load a model whose skeleton is another package's; empty if it can."""
    directory = Path(request.adapter_of or request.directory)
    if registered(directory) is None:
        return ""
    try:
        load_class(directory, request.trust_remote_code)
    except PlanError as e:
        return str(e)
    return ""


def _processors(directory: Path, wanted: Path, loader: AssetLoader, in_files: bool) -> tuple[Any, Any]:
    """The two processors to compare; or their files, if the wanted one, or its tokenizer, cannot be loaded here."""
    if in_files:
        return asset_facts.processor_files(directory), asset_facts.processor_files(wanted)
    try:
        expected = loader.processor_facts(wanted)
    except asset_facts.Unreadable:
        return asset_facts.processor_files(directory), asset_facts.processor_files(wanted)
    return loader.processor_facts(directory), expected


def _check_model(request: LoadRequest) -> dict[str, CheckResult]:
    results: dict[str, CheckResult] = {}
    try:
        model = load_model(request)
    except Exception as e:  # noqa: BLE001 - a model's own code runs here; the finding is the output
        return {"load": failed(e)}
    carried = f", but for the {len(request.carried)} carried over from the base" if request.carried else ""
    results["load"] = passed(f"{type(model).__name__}, no key missing, unexpected or renewed{carried}")
    results["generate"] = generate(model) if request.generate else _NOT_ASKED_FOR
    if request.shards and request.saved:
        compared = _compare(model, request, Path(request.shards), Path(request.saved)) if request.generate else None
        results["logits"] = compared or _NOT_ASKED_FOR
    return results


def check_assets(directory: Path, wanted: Mapping[str, str | None], loader: AssetLoader) -> CheckResult:
    """Compares the written tokenizer, processor and templates with their sources."""
    tokenizer, processor, template = (
        Path(found) if (found := wanted[key]) else None for key in ("tokenizer", "processor", "processor_template")
    )
    equal, differ, unread = [], [], []
    try:
        expected = loader.tokenizer_facts(tokenizer) if tokenizer else {}
    except asset_facts.Unreadable as e:
        expected, tokenizer = {}, None
        unread.append(str(e))
    try:
        if tokenizer:
            differ += asset_facts.differences(loader.tokenizer_facts(directory), expected)
            equal.append(f"{expected['class']} of {len(expected['ids of a probe'][0])} probe tokens")
        if processor:
            found, settings = _processors(directory, processor, loader, bool(unread))
            differ += asset_facts.differences(found, settings)
            shown = asset_facts.processor_template(template) if template else expected.get("chat template")
            if template or tokenizer:
                mine = asset_facts.processor_template(directory)
                differ += asset_facts.differences({"processor's template": mine}, {"processor's template": shown})
            equal.append(f"{found.get('class', 'settings of the')} processor")
    except Exception as e:  # noqa: BLE001 - see _check_model; a version is useless without its tokenizer
        return failed(e)
    if differ:
        return failed("; ".join(differ))
    if not equal:
        return skipped("; ".join(unread) or "there is no tokenizer")
    return passed(f"equal: {', '.join(equal)}")


def load_model(request: LoadRequest) -> Any:
    from transformers import GenerationConfig

    directory, trusted = Path(request.directory), request.trust_remote_code
    model, info = transformers_api.load(
        load_class(directory, trusted), directory, "auto", output_loading_info=True, trust_remote_code=trusted,
        generation_config=GenerationConfig(),  # the model's own may ask for modes that cannot run, or load, here
    )  # fmt: skip
    if request.carried:
        loading = transformers_api.Loading(model)
        info["unexpected_keys"] = set(info["unexpected_keys"]).difference(*map(loading.unexpected, request.carried))
    problems = {k: sorted(map(str, v))[:8] for k, v in info.items() if v}
    if problems:
        raise ValueError(f"transformers loads it, but reports {problems}")
    return model.eval()


def _check_adapter(request: LoadRequest, base: Path) -> dict[str, CheckResult]:
    """Puts the adapter on the base model: every tensor must find its place and arrive unchanged.

    The base's own weights are not needed, so its memory is allocated and never touched.
    """
    generate = skipped("an adapter alone does not generate")
    if importlib.util.find_spec("peft") is None:
        return {"load": skipped("peft is not installed"), "generate": generate}
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        trained = TransformersSkeleton.of(base, "source", request.trust_remote_code).model.to_empty(device="cpu")
        model = PeftModel.from_pretrained(trained, request.directory)
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        written = load_file(Path(request.directory, "adapter_model.safetensors"))
        if differ := sorted(found.keys() ^ written.keys()):
            raise ValueError(f"PEFT expects other tensors than those in the file: {differ[:8]}")
        if differ := [k for k, v in written.items() if not found[k].to(v.dtype).equal(v)]:
            raise ValueError(f"PEFT did not load {differ[:8]}")
    except Exception as e:  # noqa: BLE001 - see _check_model
        return {"load": failed(e)}
    detail = f"PeftModel of {type(trained).__name__}, {len(written)} tensors in place"
    return {"load": passed(detail), "generate": generate}


def _compare(model: Any, request: LoadRequest, shards: Path, saved: Path) -> CheckResult:
    from verl_autoexport.verify.against_shards import compare

    if registered(saved) is not None:
        return skipped("the shards have the names of another package's skeleton, which transformers does not load")
    if request.lora and importlib.util.find_spec("peft") is None:
        return skipped("peft, which would merge the adapter by another path, is not installed")
    base = Path(request.base) if request.base else None
    try:
        return passed(compare(model, shards, load_config(saved, request.trust_remote_code), request.lora, base))
    except Exception as e:  # noqa: BLE001 - see _check_model
        return failed(e)


def generate(model: Any) -> CheckResult:
    import torch

    from verl_autoexport.verify.against_shards import CannotRun, fixed_input, forward

    try:
        with torch.inference_mode():
            if not torch.isfinite(forward(model)).all():
                raise ValueError("the logits of a forward pass are not finite")
            ids = fixed_input(model)
            if not model.can_generate():
                return passed(f"{type(model).__name__} does not generate; forward pass finite")
            out = model.generate(ids, generation_config=_neutral(model.config), max_new_tokens=NEW_TOKENS)
    except CannotRun as e:  # no statement about the weights: those are compared with the shards
        return skipped(f"{type(model).__name__} does not run on token ids alone here: {e}")
    except Exception as e:  # noqa: BLE001 - see _check_model
        return failed(e)
    return passed(f"greedy tokens {out[0, ids.shape[1] :].tolist()}")


def _neutral(config: Any) -> Any:
    """A greedy configuration instead of the model's own: some need a tokenizer, a library or several beams."""
    from transformers import GenerationConfig

    text = config.get_text_config(decoder=True)
    start = {key: getattr(text, key, None) for key in ("decoder_start_token_id", "bos_token_id")}
    return GenerationConfig(do_sample=False, pad_token_id=0, **start)


if __name__ == "__main__":
    main()

"""Tokenizer, processor, templates, generation config: each whole from the run or from its base, equal to the run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.processing_utils import ProcessorMixin

from tests.support.assets import IMAGE, STYLES, make_processor, put
from tests.support.published import (
    END,
    SMALL,
    START,
    STOP,
    TEMPLATE,
    make_base,
    make_run,
    make_tokenizer,
    read_json,
    saved,
    write_json,
)
from verl_autoexport import export_checkpoint
from verl_autoexport.errors import VerifyError
from verl_autoexport.export.assets import Reference
from verl_autoexport.model.asset_facts import AssetLoader, processor_template
from verl_autoexport.verify.checks import LoadRequest, check_loading
from verl_autoexport.verify.load_in_child import check_assets, generate, load_model
from verl_autoexport.verify.result import CheckResult

tokenizer_facts, processor_facts = AssetLoader().tokenizer_facts, AssetLoader().processor_facts


def save(tokenizer: Any, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    return directory


def names(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {"config.json"}


def check(directory: Path, reference: Reference) -> CheckResult:
    """As the load check compares the assets, here in this process."""
    return check_assets(directory, reference.to_json(), AssetLoader())


def with_config(directory: Path, config: dict[str, Any] = SMALL) -> Path:
    write_json(directory / "config.json", config)
    return directory


# -- the tokenizer ----------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any], Any]] = {
    "eos": lambda t: setattr(t, "eos_token", STOP),
    "pad": lambda t: setattr(t, "pad_token", STOP),
    "token": lambda t: t.add_tokens(["<think>"]),
    "special token": lambda t: t.add_special_tokens({"additional_special_tokens": [START, STOP, "<tool>"]}),
    "length": lambda t: setattr(t, "model_max_length", 77),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("style", STYLES)
def test_a_changed_tokenizer_is_the_runs_and_nothing_of_the_bases(style, change, tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base", **STYLES[style]))
    write_json(base / "added_tokens.json", {"<never>": 270})
    tokenizer = AutoTokenizer.from_pretrained(base)
    CHANGES[change](tokenizer)
    files = save(tokenizer, tmp_path / "run")
    _, reference = put(files, tmp_path / "out", base)
    assert tokenizer_facts(tmp_path / "out") == tokenizer_facts(files) != tokenizer_facts(base)
    assert not {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"} & names(tmp_path / "out")
    assert check(tmp_path / "out", reference).status == "passed"
    written = read_json(tmp_path / "out/tokenizer_config.json")  # in the spelling that transformers 4 reads
    assert written["tokenizer_class"] in ("Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast")
    assert "extra_special_tokens" not in written
    assert START in written["additional_special_tokens"]


@pytest.mark.parametrize("style", STYLES)
def test_an_unchanged_tokenizer_is_in_the_bases_own_files(style, tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base", **STYLES[style]))
    files = save(AutoTokenizer.from_pretrained(base), tmp_path / "run")
    notes, reference = put(files, tmp_path / "out", base)
    assert notes == ["no generation config: the run saved none; engines use their defaults"]
    for name in names(base):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert names(tmp_path / "out") == names(base)
    assert check(tmp_path / "out", reference).status == "passed"


def test_without_a_base_the_runs_tokenizer_is_respelled(tmp_path):
    files = save(AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "own", **STYLES["llama"])), tmp_path / "run")
    _, reference = put(files, tmp_path / "out")
    assert read_json(files / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    assert read_json(tmp_path / "out/tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer_facts(tmp_path / "out") == tokenizer_facts(files)
    assert check(tmp_path / "out", reference).status == "passed"


def test_a_base_fills_what_the_run_did_not_save(tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base"))
    write_json(base / "generation_config.json", {"temperature": 0.5})
    write_json(base / "preprocessor_config.json", IMAGE)
    (base / "README.md").write_text("of the base")
    (base / "blob").write_bytes((base / "vocab.json").read_bytes())
    (base / "vocab.json").unlink()
    (base / "vocab.json").symlink_to(base / "blob")  # as in the hub's cache
    (tmp_path / "run").mkdir()
    notes, reference = put(tmp_path / "run", tmp_path / "out", base)
    assert names(tmp_path / "out") == names(base) - {"README.md", "blob"}
    assert {note.partition(":")[0] for note in notes} == {"tokenizer", "processor", "generation config"}
    assert all("the base model's; the run saved none" in note for note in notes)
    assert reference == Reference(base, base, base)


def test_a_tokenizer_that_cannot_be_loaded_is_copied_as_it_is(tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base"))
    (tmp_path / "run").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        (tmp_path / "run" / name).write_text("neither JSON nor a tokenizer")
    _, reference = put(tmp_path / "run", tmp_path / "out", base)
    assert names(tmp_path / "out") == names(tmp_path / "run")
    assert check(tmp_path / "out", reference).status == "failed"  # the processor's files are no JSON


def test_a_template_alone_is_the_runs_too(tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/chat_template.jinja").write_text("of the run")
    put(tmp_path / "run", tmp_path / "out", base)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the run"
    put(tmp_path / "run", tmp_path / "without")
    assert (tmp_path / "without/chat_template.jinja").read_text() == "of the run"


def test_no_link_of_the_runs_is_followed(tmp_path):
    make_tokenizer(tmp_path / "run")
    (tmp_path / "secret").write_text("elsewhere")
    (tmp_path / "run/tokenizer.model").symlink_to(tmp_path / "secret")
    put(tmp_path / "run", tmp_path / "out")
    assert "tokenizer.model" not in names(tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c | {"eos_token": STOP},
        lambda c: c | {"chat_template": "another"},
        lambda c: c | {"model_max_length": 5},
        lambda c: c | {"additional_special_tokens": [START, STOP, "<new>"]},
    ],
)
def test_the_check_finds_a_tokenizer_that_is_another(damage, tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base"))
    _, reference = put(save(AutoTokenizer.from_pretrained(base), tmp_path / "run"), tmp_path / "out", base)
    path = tmp_path / "out/tokenizer_config.json"
    write_json(path, damage(read_json(path)))
    assert check(tmp_path / "out", reference).status == "failed"


def test_the_check_runs_where_the_model_is_too_large_to_load(tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base"))
    _, reference = put(save(AutoTokenizer.from_pretrained(base), tmp_path / "run"), tmp_path / "out", base)
    found = check_loading(tmp_path / "out", 1 << 50, assets=reference.to_json())
    assert (found["assets"].status, found["load"].status) == ("passed", "skipped")
    (tmp_path / "out/tokenizer.json").write_text("damaged")
    with pytest.raises(VerifyError, match=r"assets failed: .*cannot load it"):
        check_loading(tmp_path / "out", 1 << 50, assets=reference.to_json())


# -- chat templates ---------------------------------------------------------------------------

TEMPLATES: dict[str, Any] = {
    "another": "{{ messages }} of the run",
    "none": None,
    "named": {"default": "of the run", "tool_use": "{{ tools }}"},
    "the same": TEMPLATE,
}


@pytest.mark.parametrize("spelled", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "nowhere"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_the_runs_for_tokenizer_and_processor(template, spelled, tmp_path):
    base = make_processor(tmp_path / "base", own_template=None, template=None)
    if spelled == "tokenizer_config.json":
        write_json(base / spelled, read_json(base / spelled) | {"chat_template": TEMPLATE})
    elif spelled == "chat_template.jinja":
        (base / spelled).write_text(TEMPLATE)
    elif spelled == "chat_template.json":
        write_json(base / spelled, {"chat_template": "the base's"})
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATES[template]
    files = with_config(save(tokenizer, tmp_path / "run"), {"model_type": "llava"})
    _, reference = put(files, tmp_path / "out", base)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES[template]
    unchanged = TEMPLATES[template] == tokenizer_facts(base)["chat template"]
    expected = processor_template(base) if unchanged else TEMPLATES[template]
    assert processor_template(tmp_path / "out") == expected
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == expected
    assert check(tmp_path / "out", reference).status == "passed"


# -- processors -------------------------------------------------------------------------------


def test_an_unchanged_processor_is_in_the_bases_own_files(tmp_path):
    base = make_processor(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    files = with_config(save(processor, tmp_path / "run"), {"model_type": "llava"})
    assert names(files).isdisjoint({"preprocessor_config.json", "chat_template.json"})
    _, reference = put(files, tmp_path / "out", base)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert check(tmp_path / "out", reference).status == "passed"


def test_a_changed_processor_is_the_runs_in_both_spellings(tmp_path):
    base = make_processor(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    processor.image_processor.size = {"shortest_edge": 14}
    processor.chat_template = "of the run"
    files = with_config(save(processor, tmp_path / "run"), {"model_type": "llava"})
    write_json(base / "video_preprocessor_config.json", {"of": "the base"})
    _, reference = put(files, tmp_path / "out", base)
    assert processor_facts(tmp_path / "out") == processor_facts(files) != processor_facts(base)
    assert read_json(tmp_path / "out/preprocessor_config.json")["size"] == {"shortest_edge": 14}
    assert ProcessorMixin.get_processor_dict(str(tmp_path / "out"))[0]["chat_template"] == "of the run"
    assert "video_preprocessor_config.json" not in names(tmp_path / "out")
    assert check(tmp_path / "out", reference).status == "passed"
    write_json(tmp_path / "out/chat_template.json", {"chat_template": "the base's"})
    assert "processor's template" in check(tmp_path / "out", reference).detail


# -- where generation ends ----------------------------------------------------------------------


def test_the_run_ends_where_its_tokenizer_does(tmp_path):
    """The instruct model's tokenizer on the base model: what it learned to end with is where engines stop."""
    base = make_tokenizer(make_base(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "instruct", eos=STOP))
    run = make_run(tmp_path / "run", base, tokenizer, eos_token_id=258, pad_token_id=256)
    GenerationConfig.from_pretrained(base).save_pretrained(saved(run))
    record = export_checkpoint(run, tmp_path / "out", base_model=str(base))
    assert record.verification["assets"]["status"] == record.verification["logits"]["status"] == "passed"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == STOP
    assert read_json(tmp_path / "out/config.json")["eos_token_id"] == 258
    generation = read_json(tmp_path / "out/generation_config.json")
    assert (generation["eos_token_id"], generation["temperature"]) == ([258, 256], 0.6)
    assert any("eos_token_id 258 for 256" in note for note in record.notes)


@pytest.mark.parametrize(("known", "expected"), [(256, [258, 256]), ([258, 256], [258, 256]), (258, 258), (None, 258)])
def test_without_a_base_the_tokenizers_end_is_among_those_of_generation(known, expected, tmp_path):
    files = make_tokenizer(tmp_path / "run", eos=STOP)
    write_json(files / "generation_config.json", {"eos_token_id": known})
    put(files, tmp_path / "out")
    assert read_json(tmp_path / "out/generation_config.json")["eos_token_id"] == expected


def test_tokens_of_an_unchanged_tokenizer_stay_as_the_base_has_them(tmp_path):
    base = make_tokenizer(make_base(tmp_path / "base", eos_token_id=[256, 258], pad_token_id=None))
    files = with_config(save(AutoTokenizer.from_pretrained(base), tmp_path / "run"))
    GenerationConfig.from_pretrained(base).save_pretrained(files)
    before = (base / "generation_config.json").read_bytes()
    put(files, tmp_path / "out", base)
    assert (tmp_path / "out/generation_config.json").read_bytes() == before  # and in the base's own spelling


SETTINGS: list[dict[str, Any]] = [
    {"stop_strings": ["</s>"]}, {"num_return_sequences": 4}, {"penalty_alpha": 0.6, "top_k": 4},
    {"cache_implementation": "quantized"}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"do_sample": True, "temperature": 0.7, "typical_p": 0.9}, {"max_length": 3}, {"min_new_tokens": 500},
    {"prompt_lookup_num_tokens": 3}, {"force_words_ids": [[1]], "num_beams": 2}, {"dola_layers": "high"},
    {"watermarking_config": {"greenlist_ratio": 0.3}}, {"assistant_early_exit": 1}, {"eos_token_id": [1, 2, 3]},
]  # fmt: skip


def test_settings_of_generation_never_block_a_publication(tmp_path):
    base = make_tokenizer(make_base(tmp_path / "base"))
    run = make_run(tmp_path / "run", base)
    write_json(saved(run) / "generation_config.json", {"num_return_sequences": 4})
    record = export_checkpoint(run, tmp_path / "out", base_model=str(base))
    assert record.verification["generate"]["status"] == "passed"
    assert any("transformers refuses it: Greedy methods" in note for note in record.notes)
    for settings in SETTINGS:
        write_json(tmp_path / "out/generation_config.json", settings)
        assert generate(load_model(LoadRequest(str(tmp_path / "out")))).status == "passed", settings


def test_a_template_inside_the_tokenizers_settings_alone(tmp_path):
    """As many models of images have it; transformers 5 saves the processor's in a file of its own."""
    base = make_processor(tmp_path / "base", own_template=None)
    processor = AutoProcessor.from_pretrained(base)
    files = with_config(save(processor, tmp_path / "run"), {"model_type": "llava"})
    _, reference = put(files, tmp_path / "out", base)
    assert check(tmp_path / "out", reference).status == "passed"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    _, reference = put(make_processor(tmp_path / "old", own_template=None), tmp_path / "alone")
    assert check(tmp_path / "alone", reference).status == "passed"


def test_a_tokenizer_without_ids_for_the_probe(tmp_path):
    from tokenizers import Tokenizer, models

    files = with_config(make_tokenizer(tmp_path / "run", kind="PreTrainedTokenizerFast"))
    Tokenizer(models.WordLevel({"a": 0, END: 256, START: 257, STOP: 258}, unk_token="[UNK]")).save(
        str(files / "tokenizer.json")
    )
    _, reference = put(files, tmp_path / "out")
    assert check(tmp_path / "out", reference).status == "passed"


def test_code_of_a_tokenizer_that_the_base_fills_in(tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base", auto_map={"AutoTokenizer": ["tok_own.Own", None]}))
    (base / "tok_own.py").write_text("from .more import x\nclass Own: pass\n")
    (base / "more.py").write_text("x = 1\n")
    (tmp_path / "run").mkdir()
    notes, _ = put(tmp_path / "run", tmp_path / "out", base)
    assert {"tok_own.py", "more.py"} <= names(tmp_path / "out")
    assert any("more.py" in note for note in notes)


def test_large_files_of_another_kind_are_not_read(tmp_path):
    base = with_config(make_tokenizer(tmp_path / "base"))
    with (base / "tf_model.h5").open("wb") as file:
        file.truncate(1 << 40)
    assert tokenizer_facts(base)["class"] == "Qwen2Tokenizer"

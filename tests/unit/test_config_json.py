"""A change to a config.json is spelled as the file spells it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from tests.support.bases import config_of
from verl_autoexport.model import transformers_api
from verl_autoexport.model.base_model import BaseModel
from verl_autoexport.model.config_json import overlay, set_dtype, write_base_config
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton
from verl_autoexport.shards.manifest import ShardManifest


def test_overlay_changes_only_what_differs():
    file = {"a": 1, "b": {"c": 2, "x": 0}, "own": True, "vocab_size": 5}
    known = {"a": 1, "b": {"c": 2, "d": 3}, "text_config": {"vocab_size": 5}, "gone": 1, "dtype": "float32"}
    wanted = {"a": 1, "b": {"c": 4, "d": 3}, "text_config": {"vocab_size": 6}, "dtype": "bfloat16"}
    assert overlay(file, known, wanted) == {"a": 1, "b": {"c": 4, "x": 0}, "own": True, "vocab_size": 6}
    assert overlay(file, known, known) == file
    assert overlay(file, known, known | {"text_config": None}) == file | {"text_config": None}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({}, {"torch_dtype": "float16"}),
        ({"transformers_version": "5.1"}, {"transformers_version": "5.1", "dtype": "float16"}),
        ({"text_config": {"dtype": "x"}}, {"text_config": {"dtype": "float16"}, "dtype": "float16"}),
        ({"a_config": None, "torch_dtype": None}, {"a_config": None, "torch_dtype": "float16"}),
    ],
)
def test_dtype_is_spelled_as_in_the_file(file, expected):
    set_dtype(file, "float16")
    assert file == expected


def test_a_key_is_changed_under_the_name_that_the_file_has():
    aliases = {"num_local_experts": frozenset({"num_experts"})}
    known, wanted = {"num_local_experts": 8}, {"num_local_experts": 4}
    assert overlay({"num_experts": 8}, known, wanted, aliases) == {"num_experts": 4}
    assert overlay({"num_experts": 8}, known, {}, aliases) == {}


# -- rope -----------------------------------------------------------------------------------


ROPE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "theta": ({"rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "scaled": (
        {"rope_theta": 1e4, "rope_scaling": None}, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "no longer scaled": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "default", "rope_theta": 1e4},
        {"rope_scaling": None, "rope_theta": 1e4},
    ),
    "by other names": (
        {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    ),
    "by type of layers": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPE)
def test_rope_in_the_spelling_of_an_old_file(case):
    file, wanted, expected = ROPE[case]
    known = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}
    assert overlay(file, known, {"rope_parameters": wanted}, old=True) == expected
    nested = overlay(
        {"text_config": file}, {"text_config": known}, {"text_config": {"rope_parameters": wanted}}, old=True
    )
    assert nested == {"text_config": expected}
    new = overlay({"rope_parameters": known["rope_parameters"]}, known, {"rope_parameters": wanted})
    assert new["rope_parameters"].items() >= wanted.items()


def test_a_change_of_rope_is_said_by_every_name_that_the_file_has(tmp_path):
    """`rotary_emb_base` is what transformers 4 reads of a GPT-NeoX, `rope_theta` what other readers do."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    old = {"model_type": "gpt_neox", "vocab_size": 32, "rotary_emb_base": 10000, "rope_theta": 10000, **small}
    base = BaseModel(tmp_path / "base", {}, old, ShardManifest((), {}, 1, "", ""))
    target = tmp_path / "target"
    for folder in (base.directory, target):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(old))
    config = transformers.AutoConfig.from_pretrained(base.directory)
    config.rope_parameters["rope_theta"] = 5e5
    skeleton = TransformersSkeleton(transformers_api.build(transformers.GPTNeoXForCausalLM, config))
    assert write_base_config(skeleton, None, base, target) is None
    assert config_of(target) == old | {
        "architectures": ["GPTNeoXForCausalLM"], "rotary_emb_base": 5e5, "rope_theta": 5e5
    }  # fmt: skip

"""The rules of a class, asked without weights, against a model that the installed transformers saves and loads.

This holds beside transformers 4 and 5: where they differ, both are right about themselves.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers

from tests.support import families
from tests.support.exports import tensors
from verl_autoexport.model import transformers_api
from verl_autoexport.model.conversion import class_outputs
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton

NAMES = [n for n in ("llama", "gemma3_text", "mixtral", "t5", "gemma3", "qwen2_5_vl") if n in families.WRITTEN]
KEPT = {"t5": ("wo.weight",)}
"""Ends of the names that these families keep in float32 when they are loaded in float16."""


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    """A family, and the directory of a model of it."""
    values = families.config(request.param)
    config = transformers.AutoConfig.for_model(**values)
    config.architectures = values["architectures"]
    directory = tmp_path_factory.mktemp(request.param)
    getattr(transformers, values["architectures"][0])(config).save_pretrained(directory)
    return request.param, directory


def test_names_on_disk_are_those_of_save_pretrained(family):
    _, directory = family
    skeleton = TransformersSkeleton.of(directory, "source")
    assert {o.name for o in class_outputs(skeleton)} == tensors(directory).keys()


def test_every_tensor_on_disk_has_a_place(family):
    _, directory = family
    skeleton = TransformersSkeleton.of(directory, "source")
    placed = {skeleton.place(name)[0] for name in tensors(directory)}
    assert placed == skeleton.tensors.keys() - skeleton.tied.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_are_those_of_a_loaded_model(family, dtype):
    name, directory = family
    skeleton = TransformersSkeleton.of(directory, dtype)
    loaded = transformers_api.load(type(skeleton.model), directory, getattr(torch, dtype))
    state = loaded.state_dict()
    found = {k: skeleton.dtype_of(k, dtype) for k, t in state.items() if t.is_floating_point()}
    assert found == {k: str(state[k].dtype).removeprefix("torch.") for k in found}
    kept = {k for k, v in found.items() if v == "float32" and k.endswith(KEPT.get(name, ()))}
    assert bool(kept) == (name in KEPT and dtype == "float16")


def test_nested_configurations_have_the_dtype(family):
    _, directory = family
    config = deepcopy(TransformersSkeleton.of(directory, "float16").config)
    said = [v for k in ("text_config", "vision_config") if (v := getattr(config, k, None)) is not None]
    assert {
        str(v) for c in (config, *said) for k, v in vars(c).items() if k.lstrip("_") in ("dtype", "torch_dtype")
    } == {"torch.float16"}

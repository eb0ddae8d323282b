"""Where verl writes Hugging Face weights into a checkpoint, and in which order, in the wheel of every release.

The wheels are parsed, not installed. A failure names the version and what changed in it.
"""

from __future__ import annotations

import ast
from typing import Any

import pytest

from tests.support.wheels import VERSIONS, find, lines, sources

FSDP, MEGATRON = (f"verl.utils.checkpoint.{kind}_checkpoint_manager" for kind in ("fsdp", "megatron"))
MANAGERS = {FSDP: "FSDPCheckpointManager", MEGATRON: "MegatronCheckpointManager"}
PATHS = "verl.utils.megatron_utils"
NESTED = tuple(version for version in VERSIONS if version >= "0.9.0")
"""Releases with the second layout of Megatron's checkpoints."""
FLAT = tuple(version for version in VERSIONS if version not in NESTED)


def method(version: str, module: str, name: str = "save_checkpoint") -> Any:
    return find(ast.parse(sources(version)[module]), MANAGERS[module], name)


def constants(tree: ast.Module) -> dict[str, Any]:
    """{name: value} of a module's constants."""
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
    return {ast.unparse(n.targets[0]): ast.literal_eval(n.value) for n in assigned}


@pytest.mark.parametrize("version", VERSIONS)
def test_fsdp_writes_hf_model_beside_its_shards(version: str) -> None:
    saved = method(version, FSDP)
    source = ast.unparse(saved)
    assert "hf_local_path = os.path.join(local_path, 'huggingface')" in source, f"verl {version}: it lies elsewhere"
    branches = [n for n in ast.walk(saved) if isinstance(n, ast.If)]
    (ours,) = [n for n in branches if ast.unparse(n.test) == "self.should_save_hf_model"]
    assert lines(ours, "save_model.save_pretrained"), f"verl {version}: transformers does not save it"
    assert lines(ours, "torch.distributed.barrier"), f"verl {version}: the other ranks do not wait for the weights"


@pytest.mark.parametrize("version", FLAT)
def test_megatron_up_to_0_8_writes_beside_its_shards(version: str) -> None:
    path = ast.unparse(find(ast.parse(sources(version)[PATHS]), "get_hf_model_checkpoint_path"))
    assert "return os.path.join(checkpoint_path, 'huggingface')" in path, f"verl {version}: {path}"
    assert "ckpt_contents" not in sources(version)[MEGATRON], f"verl {version}: it marks complete saves"


@pytest.mark.parametrize("version", NESTED)
def test_megatron_from_0_9_on_nests_the_weights(version: str) -> None:
    tree = ast.parse(sources(version)[PATHS])
    names = constants(tree)
    assert (names["_MODEL_SUBDIR"], names["_HUGGINGFACE_SUBDIR"]) == ("model", "huggingface")
    path = ast.unparse(find(tree, "get_hf_model_checkpoint_path"))
    assert "os.path.join(get_model_checkpoint_path(checkpoint_path), _HUGGINGFACE_SUBDIR)" in path
    path = ast.unparse(find(tree, "get_checkpoint_contents_manifest_path"))
    assert "return os.path.join(checkpoint_path, 'ckpt_contents.json')" in path


@pytest.mark.parametrize("version", NESTED)
def test_megatron_marks_a_save_after_its_weights(version: str) -> None:
    saved = method(version, MEGATRON)
    (weights,), (end,) = lines(saved, "self._save_model_as_hf_via_bridge"), lines(saved, "self._dispatch_finalize")
    assert weights < end, f"verl {version}: weights come after the end of a save"
    final = method(version, MEGATRON, "_finalize_save")
    assert lines(final, "self._write_checkpoint_manifest"), f"verl {version}: the end of a save is not marked"
    written = ast.unparse(method(version, MEGATRON, "_write_checkpoint_manifest"))
    assert "os.replace(tmp_path, manifest_path)" in written, f"verl {version}: the mark may be half written"
    made = ast.unparse(method(version, MEGATRON, "_build_checkpoint_manifest"))
    for key in ("'path': hf_rel", "'format': 'huggingface'", "'peft': self.peft_cls is not None"):
        assert key in made, f"verl {version}: ckpt_contents.json has no {key}"


@pytest.mark.parametrize("version", [v for v in VERSIONS if v >= "0.8.0"])
def test_megatron_saves_only_the_adapter_of_lora(version: str) -> None:
    source = sources(version)[MEGATRON]
    assert 'os.path.join(hf_ckpt_path, "adapter")' in source, f"verl {version}: the adapter lies elsewhere"
    assert "self.bridge.save_hf_adapter(self.model, hf_adapter_ckpt_path, self.peft_cls)" in source


@pytest.mark.parametrize("version", ["0.7.0", "0.7.1"])
def test_megatron_saved_the_adapter_elsewhere(version: str) -> None:
    assert 'os.path.join(local_path, "adapter_checkpoint")' in sources(version)[MEGATRON]

"""Versions share on disk what training does not change."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.exports import tensors
from tests.support.sharding import QWEN2, make_checkpoint
from verl_autoexport.export.pipeline import export_to_registry
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.registry.retention import Keep, stored
from verl_autoexport.registry.shared_files import find_shared, link_shared
from verl_autoexport.verify.directory import check_directory

CONFIG = QWEN2 | {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 1024}
FROZEN = ("model.embed_tokens.", "model.layers.0.")  # half of the model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("half"), CONFIG, reference=False)


@pytest.fixture
def train(source, registry):
    """Makes the checkpoint of a step, in which nothing but the other half has changed, and exports it."""
    names = set(torch.load(source / "actor/model_world_size_2_rank_0.pt", weights_only=False))
    frozen = frozenset(name for name in names if name.startswith(FROZEN))

    def train(step: int, trained: str | None = None, known: bool = True):
        """`trained`: what of the frozen is trained from now on; `known`: whether the run tells what is frozen."""
        left = frozenset(name for name in frozen if trained is None or not name.startswith(trained))
        for path in sorted((source / "actor").glob("*.pt")):
            state = torch.load(path, weights_only=False)
            for name, value in state.items():
                if name not in left:
                    value.to_local().normal_()
            torch.save(state, path)
        spec = checkpoint_spec(source, verify=False, max_shard_size="1GB")
        return export_to_registry(replace(spec, step=step, frozen=left if known else None), registry, LocalRunner(1))

    return train


def on_disk(root: Path) -> int:
    """Bytes of the files of all versions, each file counted once however many names it has."""
    files = {(s.st_ino, s.st_size) for p in root.glob("v*/*") if p.is_file() for s in (p.stat(),)}
    return sum(size for _, size in files)


def test_ten_versions_of_a_model_with_a_frozen_half(train, registry, root):
    first = train(1)
    once = on_disk(root)
    for step in range(2, 11):
        train(step)
    versions = registry.versions()
    assert on_disk(root) <= 5.6 * once
    assert abs(stored(versions) - on_disk(root)) < 0.02 * once
    marks = [[(f.get("apart"), f.get("linked")) for f in v.record.files if f["bytes"] > 1 << 20] for v in versions]
    assert marks == [[(True, None), (None, None)], *[[(True, True), (None, None)]] * 9]
    for version in (first, versions[-1]):
        assert {c.status for c in check_directory(version.path).values()} == {"passed"}
        AutoModelForCausalLM.from_pretrained(version.path)
    a, b = tensors(first.path), tensors(versions[-1].path)
    assert {k for k in a if torch.equal(a[k], b[k])} == {k for k in a if k.startswith(FROZEN)}


def test_an_export_by_hand_keeps_apart_what_the_version_before_did(train):
    train(1)
    version = train(2, known=False)
    assert [f["name"] for f in version.record.files if f.get("linked")] == ["model-00001-of-00002.safetensors"]


def test_what_is_trained_later_is_no_longer_kept_apart(train):
    train(1)
    second, third = train(2, trained="model.layers.0."), train(3, trained="model.layers.0.")
    assert [f.get("linked") for f in second.record.files if f.get("apart")] == [None]  # fewer tensors than before
    assert [f.get("linked") for f in third.record.files if f.get("apart")] == [True]


def test_what_was_changed_since_or_is_gone_is_no_twin(train, registry, root):
    first = train(1)
    shared = first.path / "model-00001-of-00002.safetensors"
    content = bytearray(shared.read_bytes())
    content[-1] ^= 1
    shared.write_bytes(content)
    second = train(2)
    assert not any(f.get("linked") for f in second.record.files)
    assert check_directory(second.path, load=False)["hashes"].status == "passed"
    file = next(f for f in second.record.files if f.get("apart"))
    shared = find_shared(registry.versions())
    copy = root / "copy"
    copy.write_bytes((second.path / file["name"]).read_bytes())
    for version in (first, second):
        os.unlink(version.path / file["name"])
    assert not link_shared(copy, file["sha256"], file["bytes"], shared)
    assert copy.stat().st_nlink == 1
    assert [p for p in root.iterdir() if ".tmp-" in p.name] == []


def test_removing_a_version_leaves_the_others_whole(train, registry, root):
    for step in (1, 2, 3):
        train(step)
    registry.prune(Keep(last=1))
    (left,) = registry.versions()
    assert check_directory(left.path, load=False)["hashes"].status == "passed"
    assert stored([left]) == pytest.approx(on_disk(root), rel=0.02)


def test_what_is_linked_counts_once_for_max_bytes(train, registry):
    for step in (1, 2, 3):
        train(step)
    versions = registry.versions()
    assert registry.plan_retention(Keep(max_bytes=stored(versions))).removed == ()
    assert [v.version.step for v in registry.plan_retention(Keep(max_bytes=stored(versions) - 1)).removed] == [1]

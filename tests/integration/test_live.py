"""The live source: copies of sharded modules against the checkpoints of the same weights."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.sharding import QWEN2, QWEN3_MOE, make_checkpoints
from verl_autoexport.errors import PlanError
from verl_autoexport.export.pipeline import export_to_directory
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.merge.reader import ShardReader
from verl_autoexport.shards.manifest import ShardManifest
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles
from verl_autoexport.sources.live.coordinator import split_otherwise
from verl_autoexport.sources.live.copier import make_manifest

VALUE = QWEN2 | {"architectures": ["Qwen2ForTokenClassification"], "num_labels": 1}
TIED = QWEN2 | {"tie_word_embeddings": True}
HEAD = "lm_head.weight"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CASES = {
    3: {
        "fsdp2": {"config": QWEN2, "live": "float32"},
        "fsdp2_bf16": {"config": QWEN3_MOE, "live": "bfloat16"},
        "fsdp1": {"config": QWEN2, "strategy": "fsdp", "live": "float32"},
        "fsdp1_tied": {"config": TIED, "strategy": "fsdp", "live": "bfloat16"},
        "fsdp1_moe": {"config": QWEN3_MOE, "strategy": "fsdp", "live": "bfloat16"},
        "fsdp1_lora": {"config": QWEN2, "strategy": "fsdp", "lora": LORA, "live": "float32"},
        "fsdp2_lora": {"config": QWEN2, "lora": LORA, "live": "float32"},
        "tied": {"config": TIED, "live": "float16"},
        "value": {"config": VALUE, "live": "float32", "role": "critic"},
        "value_fsdp1": {"config": VALUE, "live": "bfloat16", "role": "critic", "strategy": "fsdp"},
        "apart": {"config": QWEN2, "live": "float32", "saved": {"tie_word_embeddings": True}},
        "apart_fsdp1": {
            "config": QWEN2,
            "strategy": "fsdp",
            "live": "bfloat16",
            "saved": {"tie_word_embeddings": True},
        },
        "offloaded": {"config": QWEN2, "live": "bfloat16", "offload": True},
    },
    4: {
        "hsdp": {"config": QWEN2, "mesh": (2, 2), "live": "bfloat16"},
        "hsdp1": {"config": QWEN2, "mesh": (2, 2), "strategy": "fsdp", "live": "bfloat16"},
    },
    1: {"alone": {"config": QWEN2, "live": "bfloat16"}},
}
NAMES = [(name, case["live"]) for cases in CASES.values() for name, case in cases.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("live")
    for world, cases in CASES.items():
        make_checkpoints({folder / name: case | {"reference": False} for name, case in cases.items()}, world)
    return lambda name: folder / name


def read(folder: Path) -> ShardManifest:
    layouts = [pickle.loads(p.read_bytes()) for p in sorted(folder.glob("*.layout"))]
    files = [[folder / f"{layout.rank}-{i}.bin" for i in range(len(layout.chunks))] for layout in layouts]
    return make_manifest(layouts, files, "fsdp2", "x")


@pytest.mark.parametrize(("name", "dtype"), NAMES)
def test_equals_the_checkpoint(name, dtype, made):
    role = "critic" if "value" in name else "actor"
    saved, live = FsdpFiles(made(name) / role).manifest(), read(made(name) / "live")
    aliases = {"lm_head.weight"} if "tied" in name else set()
    assert saved.tensors.keys() - aliases == live.tensors.keys()
    with ShardReader(saved) as theirs, ShardReader(live) as ours:
        for fqn in live.tensors:
            expected = theirs.whole(fqn).to(getattr(torch, dtype))
            assert torch.equal(ours.whole(fqn), expected), fqn


def test_one_replica_group_does_the_work(made):
    for name in ("hsdp", "hsdp1"):
        ranks = {s.rank for t in read(made(name) / "live").tensors.values() for s in t.shards}
        assert ranks == {0, 1}


def test_chunks_are_bounded_and_full(made):
    layout = pickle.loads((made("fsdp1") / "live/0.layout").read_bytes())
    assert max(layout.chunks) <= 1 << 14
    assert sum(layout.chunks) > (len(layout.chunks) - 1) << 13
    assert max(Counter(part.fqn for part in layout.parts).values()) > 1  # larger tensors are cut


@pytest.mark.parametrize(("name", "otherwise"), [("fsdp2", set()), ("fsdp1", {HEAD}), ("hsdp", set()), ("tied", set())])
def test_which_tied_tensors_a_rank_cannot_compare(name, otherwise, made):
    """FSDP1 cuts a flattened group of them wherever a rank's part ends."""
    layouts = [pickle.loads(p.read_bytes()) for p in sorted((made(name) / "live").glob("*.layout"))]
    assert split_otherwise(layouts, {HEAD: "model.embed_tokens.weight"}) == otherwise


@pytest.mark.parametrize("name", ["apart", "apart_fsdp1"])
def test_tied_tensors_that_differ_are_refused_where_both_are_copied(name, made, tmp_path):
    spec = replace(checkpoint_spec(made(name) / "actor", verify=False), source=Copied(made(name) / "live"))
    with pytest.raises(PlanError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied according to"):
        export_to_directory(spec, tmp_path / "out", LocalRunner(1))


class Copied:
    """The copies on disk as a source."""

    kind = "live"

    def __init__(self, folder: Path) -> None:
        self.folder, self.directory, self.fingerprint = folder, folder, "x"

    def manifest(self) -> ShardManifest:
        return read(self.folder)

    def verify_checksums(self, *args: object) -> None:
        pass

    def check_unchanged(self) -> None:
        pass

    def drop_cache(self) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("value", "fused"),
        ("value_fsdp1", "fused"),
        ("fsdp2_lora", "adapter"),
        ("fsdp1_lora", "both"),
        ("tied", "fused"),
    ],
)
def test_exports_as_the_checkpoint_does(name, lora, made, tmp_path):
    dtype = {"fsdp2_lora": "float32", "fsdp1_lora": "float32", "tied": "float16"}.get(name, "bfloat16")
    checkpoint = made(name) / ("critic" if "value" in name else "actor")
    base = str(made(name) / "base") if "lora" in name else None
    spec = checkpoint_spec(checkpoint, dtype=dtype, lora=lora, base_model=base, verify=False, max_shard_size="40KB")
    export_to_directory(spec, tmp_path / "saved", LocalRunner(1))
    live = replace(spec, source=Copied(made(name) / "live"), hand_over_s=1.5)
    record = export_to_directory(live, tmp_path / "live", LocalRunner(1))
    assert record.timings_s["hand_over"] == 1.5
    if "value" in name:
        assert record.architectures == ("Qwen2ForTokenClassification",)
    files = sorted(p.relative_to(tmp_path / "saved") for p in (tmp_path / "saved").rglob("*") if p.is_file())
    assert len(files) > 3
    for file in files:
        if file.name != "export.json":
            assert (tmp_path / "live" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes(), file

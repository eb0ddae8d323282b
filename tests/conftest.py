"""What several folders share: checkpoints, made once per session when first asked for, a registry, and a Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import STEP
from tests.support.sharding import QWEN2, QWEN3_MOE, make_checkpoint, make_checkpoints
from verl_autoexport.registry.store import Registry

RESNET = {
    "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "embedding_size": 8,
    "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3,
}  # fmt: skip
CHECKPOINTS = {
    2: {
        "even": {"config": QWEN2 | {"vocab_size": 128}},
        "tied": {"config": QWEN2 | {"tie_word_embeddings": True}},
        "fsdp1": {"config": QWEN2, "strategy": "fsdp"},
        "moe": {"config": QWEN3_MOE},  # packed experts in memory, one by one on disk
        "bf16": {"config": QWEN2, "dtype": "bfloat16"},
        "buffers": {"config": RESNET},  # plain int64 and float buffers among the DTensors
        "inner": {"config": QWEN3_MOE, "strategy": "placed"},  # Shard(1) of matrices and of packed experts
        "unpacked": {  # experts one by one, as in transformers 4; unevenly sharded
            "config": QWEN3_MOE | {"moe_intermediate_size": 25},
            "strategy": "unpacked",
        },
    },
    3: {"uneven": {"config": QWEN2}},
    4: {
        "hsdp": {"config": QWEN2, "mesh": (2, 2)},
        "grid": {"config": QWEN3_MOE, "strategy": "placed", "mesh": (2, 2)},  # Shard of two dimensions
    },
}
"""World size → name → arguments; one world size is made at once, for most of the time is the start of processes."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in `CHECKPOINTS` → a `global_step_7` with `actor/` and the unsharded `reference/`; only to be read."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            world_size, cases = next((w, cases) for w, cases in CHECKPOINTS.items() if name in cases)
            paths = {case: tmp_path_factory.mktemp(case) / f"global_step_{STEP}" for case in cases}
            make_checkpoints({paths[case]: cases[case] for case in cases}, world_size)
            made.update(paths)
        return made[name]

    return get


@pytest.fixture
def own_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same, but a copy that the test may damage."""

    def get(name: str) -> Path:
        return shutil.copytree(checkpoint(name), tmp_path / name / f"global_step_{STEP}")

    return get


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint; only to be read."""
    return make_checkpoint(tmp_path_factory.mktemp("small"), QWEN2, reference=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs in this process."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "exports"


@pytest.fixture
def registry(root: Path) -> Registry:
    return Registry.create(root)

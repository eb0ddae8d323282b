"""Damaged checkpoints of several families: refused in one line, with nothing left; or the damage changes nothing.

Each case damages a whole checkpoint in one way. Never may a model come out that is not the one that was trained.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.support import families
from tests.support.checkpoints import edit, rank_file, truncate
from tests.support.exports import export, tensors
from tests.support.sharding import make_checkpoints
from verl_autoexport.errors import AutoExportError

TINY = ("mixtral", "gemma3_text", "t5", "deepseek_v3", "qwen3_vl_moe", "OlmoHybridForCausalLM")
pytestmark = pytest.mark.full
Change = Callable[[Path, random.Random, "Sources"], Any]


class Sources:
    """Where whole checkpoints are: `good`, and one of `three` ranks and one of `another` size."""

    def __init__(self, folder: Path, family: str) -> None:
        self.good, self.three, self.another = (folder / kind / family for kind in ("good", "three", "another"))
        self.reference = self.good / "reference"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sources]:
    folder = tmp_path_factory.mktemp("sources")
    found = {name: Sources(folder, name) for name in TINY}
    two: dict[Path, dict[str, Any]] = {}
    for number, (name, source) in enumerate(found.items()):
        config = families.config(name)
        key = "vocab_size" if "vocab_size" in config else "text_config"
        smaller = {key: 128 if key == "vocab_size" else config[key] | {"vocab_size": 128}}
        two[source.good] = {"config": config, "strategy": ("fsdp2", "fsdp")[number % 2]}
        two[source.another] = {"config": config | smaller}
    make_checkpoints(two, 2)
    make_checkpoints({s.three: {"config": families.config(name)} for name, s in found.items()}, 3)
    return found


def names(made: Path, sharded: bool = True) -> list[str]:
    shards = torch.load(rank_file(made, 0), weights_only=False)
    return [k for k, v in shards.items() if not sharded or (isinstance(v, DTensor) and v.shape[0] > 1)]


def one(made: Path, rng: random.Random) -> str:
    return rng.choice(names(made))


def swap_ranks(made: Path, rng: random.Random, sources: Sources) -> None:
    a, b = rank_file(made, 0), rank_file(made, 1)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def files_of(other: str, both: bool) -> Change:
    """The files of both ranks, or of one, are those of another checkpoint: `three` ranks, or `another` size."""

    def change(made: Path, rng: random.Random, sources: Sources) -> None:
        for rank in range(2) if both else [rng.randrange(2)]:
            shutil.copy(rank_file(getattr(sources, other), rank), rank_file(made, rank))

    return change


def config_of_another_size(made: Path, rng: random.Random, sources: Sources) -> None:
    shutil.copy(sources.another / "actor/huggingface/config.json", made / "actor/huggingface/config.json")


def config_of_another_family(made: Path, rng: random.Random, sources: Sources) -> None:
    others = [p for p in sources.good.parent.iterdir() if p.name != sources.good.name]
    config = rng.choice(sorted(others)) / "actor/huggingface/config.json"
    shutil.copy(config, made / "actor/huggingface/config.json")


def config_number(made: Path, rng: random.Random, sources: Sources) -> None:
    """A size that the shapes depend on."""
    path = made / "actor/huggingface/config.json"
    config = json.loads(path.read_text())
    node = config.get("text_config", config)
    sizes = ("vocab_size", "hidden_size", "d_model", "intermediate_size", "d_ff", "num_hidden_layers", "num_layers",
             "num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")  # fmt: skip
    key = rng.choice([k for k in sizes if isinstance(node.get(k), int)])
    if key in ("num_hidden_layers", "num_layers"):
        node.pop("layer_types", None)
        node[key] = node[key] - 1
    else:
        node[key] = node[key] * 2
    path.write_text(json.dumps(config))


def tie_flipped(made: Path, rng: random.Random, sources: Sources) -> None:
    path = made / "actor/huggingface/config.json"
    config = json.loads(path.read_text())
    for node in (config, config.get("text_config", {})):
        if "tie_word_embeddings" in node:
            node["tie_word_embeddings"] = not node["tie_word_embeddings"]
    path.write_text(json.dumps(config))


def removed(ranks: tuple[int, ...]) -> Change:
    def change(made: Path, rng: random.Random, sources: Sources) -> None:
        name = rng.choice(names(made, sharded=False))
        edit(made, lambda shards: shards.pop(name), ranks)

    return change


def added(ranks: tuple[int, ...]) -> Change:
    def change(made: Path, rng: random.Random, sources: Sources) -> None:
        name = one(made, rng)
        edit(made, lambda shards: shards.update({name + "_old": shards[name]}), ranks)

    return change


def cast(dtype: torch.dtype, ranks: tuple[int, ...]) -> Change:
    def change(made: Path, rng: random.Random, sources: Sources) -> None:
        name = one(made, rng)
        edit(made, lambda shards: shards.update({name: rebuilt(shards[name], dtype=dtype)}), ranks)

    return change


def placed(make: Callable[[DTensor], DTensor], everything: bool = False) -> Change:
    """Tensors whose placement or global shape is wrong."""

    def change(made: Path, rng: random.Random, sources: Sources) -> None:
        chosen = names(made) if everything else [one(made, rng)]
        edit(made, lambda shards: shards.update({name: make(shards[name]) for name in chosen}))

    return change


def rebuilt(tensor: DTensor, placement: Any = None, shape: Any = None, dtype: torch.dtype | None = None) -> DTensor:
    """The same local values under another description; the mesh object stays, and whose rank it is."""
    spec, shape = tensor._spec, torch.Size(shape or tensor.shape)
    local = tensor.to_local().to(dtype or tensor.dtype)
    meta = spec.tensor_meta._replace(shape=shape, stride=torch.empty(shape, device="meta").stride(), dtype=local.dtype)
    placements = spec.placements if placement is None else (placement,)
    return DTensor(local, type(spec)(spec.mesh, placements, tensor_meta=meta), requires_grad=False)


CHANGES: dict[str, Change] = {
    "empty": lambda made, rng, _: truncate(rank_file(made, rng.randrange(2)), 0),
    "truncated": lambda made, rng, _: truncate(p := rank_file(made, 1), rng.randrange(1, p.stat().st_size)),
    "rank missing": lambda made, rng, _: rank_file(made, rng.randrange(2)).unlink(),
    "ranks swapped": swap_ranks,
    "a rank of three": files_of("three", both=False),
    "two of three ranks": files_of("three", both=True),
    "a rank of another size": files_of("another", both=False),
    "ranks of another size": files_of("another", both=True),
    "config of another size": config_of_another_size,
    "config of another family": config_of_another_family,
    "a number in the config": config_number,
    "tied or not": tie_flipped,
    "removed on one rank": removed((1,)),
    "removed": removed((0, 1)),
    "added on one rank": added((0,)),
    "added": added((0, 1)),
    "bfloat16 on one rank": cast(torch.bfloat16, (1,)),
    "float64 on one rank": cast(torch.float64, (0,)),
    "integers": cast(torch.int32, (0, 1)),
    "eight bits": cast(torch.float8_e4m3fn, (0, 1)),
    "replicated, as it was": placed(lambda t: rebuilt(t, Replicate())),
    "replicated parts": placed(lambda t: rebuilt(t, Replicate(), t.to_local().shape)),
    "all replicated parts": placed(lambda t: rebuilt(t, Replicate(), t.to_local().shape), everything=True),
    "plain parts": placed(lambda t: t.to_local().clone()),
    "all plain parts": placed(lambda t: t.to_local().clone(), everything=True),
    "another dimension": placed(lambda t: rebuilt(t, Shard(t.ndim - 1))),
    "another global shape": placed(lambda t: rebuilt(t, shape=(t.shape[0] + 2, *t.shape[1:]))),
    "not a number": placed(lambda t: t.to_local().view(-1)[:1].fill_(float("nan")) is None or t),
    "infinite": placed(lambda t: t.to_local().view(-1)[:1].fill_(float("inf")) is None or t),
}
HARMLESS = {"tied or not", "another dimension"}
"""May come out right: tied weights written twice, a vector has no other dimension."""


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("change", CHANGES)
def test_never_a_wrong_model(change, family, sources, tmp_path):
    for seed in range(2):
        folder = tmp_path / f"{seed}"
        made = shutil.copytree(sources[family].good, folder / "made")
        CHANGES[change](made, random.Random(f"{family} {change} {seed}"), sources[family])
        assert_refused_or_right(made, sources[family].reference, folder / "out", harmless=change in HARMLESS)


@pytest.mark.parametrize("family", TINY)
def test_flipped_bits(family, sources, tmp_path):
    """Anywhere in a rank file: in its directory, in the pickle, in the values."""
    rng = random.Random(family)
    made = shutil.copytree(sources[family].good, tmp_path / "made")
    path = rank_file(made, 1)
    whole = path.read_bytes()
    for number in range(60):
        content = bytearray(whole)
        at = rng.randrange(len(whole)) if number % 3 else len(whole) - 1 - rng.randrange(len(whole) // 8)
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert_refused_or_right(made, sources[family].reference, tmp_path / f"out{number}")


def assert_refused_or_right(made: Path, reference: Path, output: Path, harmless: bool = True) -> None:
    """Refused in one line and nothing there, or, if that may be, every tensor as it was trained."""
    message = refusal(made, output)
    if message is not None:
        assert message
        assert "\n" not in message
        assert not output.exists()
        assert not list(output.parent.glob(".*"))
        return
    assert harmless, "published"
    found, expected = tensors(output), tensors(reference)
    for name in found.keys() - expected.keys():
        assert any(torch.equal(found[name], t) for t in expected.values() if t.shape == found[name].shape), name
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def refusal(made: Path, output: Path) -> str | None:
    try:
        export(made, output, dtype="source")
    except AutoExportError as e:
        return str(e)
    return None

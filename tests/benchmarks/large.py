"""Checkpoints of any size and world size, written by one process: random values, verl's layout."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

# parameters -> vocabulary, hidden, intermediate, layers
SIZES = {"0.1 B": (32000, 768, 2048, 8), "0.45 B": (151936, 896, 4864, 12), "1.5 B": (151936, 1536, 8960, 22)}
_SHORT = {torch.float32: "F32", torch.bfloat16: "BF16"}


def build(size: str) -> torch.nn.Module:
    """A Qwen2 of this size on the meta device."""
    vocabulary, hidden, intermediate, layers = SIZES[size]
    config = AutoConfig.for_model(
        "qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=vocabulary, hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_verl(out: Path, size: str, ranks: int, dim: int, dtype: torch.dtype) -> None:
    """`out/` as verl's `actor/`; vectors are sharded on dimension 0, matrices on `dim`."""
    model = build(size)
    (out / "huggingface").mkdir(parents=True)
    model.config.save_pretrained(out / "huggingface")
    (out / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
        state = {}
        for name, parameter, d, _, local in _shards(model, rank, ranks, dim, dtype):
            meta = parameter.shape, parameter.stride()
            state[name] = DTensor.from_local(local, mesh, [Shard(d)], run_check=False, shape=meta[0], stride=meta[1])
        torch.save(state, out / f"model_world_size_{ranks}_rank_{rank}.pt")
        dist.destroy_process_group()


def write_dcp(out: Path, size: str, ranks: int, dim: int, dtype: torch.dtype) -> None:
    """The same model as torch's DCP writes it for its consolidation: safetensors with the offsets of each piece."""
    model = build(size)
    out.mkdir(parents=True)
    for rank in range(ranks):
        header, offsets, position, values = {}, {}, 0, []
        for name, _, _, start, local in _shards(model, rank, ranks, dim, dtype):
            size_ = local.numel() * local.element_size()
            header[name] = {
                "dtype": _SHORT[dtype], "shape": list(local.shape), "data_offsets": [position, position + size_],
            }  # fmt: skip
            offsets[name] = {"saved_offsets": start}
            position += size_
            values.append(local)
        header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        text = json.dumps(header).encode()
        with (out / f"shard-{rank:05d}-model-00001-of-00001.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for local in values:
                file.write(local.contiguous().view(-1).view(torch.uint8).numpy().data)


def _shards(
    model: torch.nn.Module, rank: int, ranks: int, dim: int, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, int, list[int], torch.Tensor]]:
    """Name, parameter, sharded dimension, offsets and values of what this rank holds; empty parts left out."""
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(rank)).to(dtype)
    for name, parameter in model.state_dict().items():
        d = dim if parameter.ndim > 1 else 0
        step = -(-parameter.shape[d] // ranks)
        start = min(rank * step, parameter.shape[d])
        shape = list(parameter.shape)
        shape[d] = min(step, parameter.shape[d] - start)
        numel = int(torch.Size(shape).numel())
        values = noise.repeat(-(-numel // len(noise)))[:numel].clone().view(shape)  # torch.save writes whole storages
        yield name, parameter, d, [start if i == d else 0 for i in range(len(shape))], values

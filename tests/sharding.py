"""Real sharded checkpoints without a training run: FSDP or FSDP2 over gloo, saved as verl saves them.

`python tests/sharding.py OUT --world-size 4 --strategy fsdp2 …` writes `OUT/actor/…` in
verl's layout and, with `--reference`, `OUT/reference`: the same model, unsharded, through
transformers' own `save_pretrained`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 131, "hidden_size": 48,
    "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 131, "hidden_size": 32,
    "intermediate_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_checkpoint(
    out: Path, config: dict[str, Any], *, world_size: int = 2, strategy: str = "fsdp2", dtype: str = "float32",
    mesh: tuple[int, ...] = (), reference: bool = True,
) -> Path:  # fmt: skip
    """A checkpoint of a randomly initialised model under `out`; returns `out`. `mesh` (ddp, fsdp) makes it HSDP."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = (str(out), config, world_size, strategy, dtype, mesh, reference, port)
    mp.start_processes(_rank, args=args, nprocs=world_size, start_method="spawn")
    return out


def build(config: dict[str, Any], dtype: str) -> Any:
    """The unsharded model, the same on every rank."""
    import transformers
    from transformers import AutoConfig

    values = dict(config)
    hf_config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = getattr(transformers, config["architectures"][0])(hf_config).to(getattr(torch, dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p, dtype=torch.float32) * 0.05)  # norms too: no value may be a default
    return model


def _rank(rank: int, out: str, config: dict, world: int, strategy: str, dtype: str, mesh: tuple, ref: bool, port: int):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = build(config, dtype)
    actor = Path(out) / "actor"
    if rank == 0:
        (actor / "huggingface").mkdir(parents=True)
        model.config.save_pretrained(actor / "huggingface")
        if model.can_generate():
            model.generation_config.save_pretrained(actor / "huggingface")
        (actor / "fsdp_config.json").write_text(
            json.dumps({"FSDP_version": 1 if strategy == "fsdp" else 2, "world_size": world})
        )
        if ref:
            model.save_pretrained(Path(out) / "reference")
    dist.barrier()
    torch.save(_shard(model, strategy, mesh or (world,)), actor / f"model_world_size_{world}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _shard(model: Any, strategy: str, mesh: tuple[int, ...]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("fsdp",) if len(mesh) == 1 else ("ddp", "fsdp"))
    if strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=device_mesh)
        return fully_shard(model, mesh=device_mesh).state_dict()
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, ShardingStrategy, StateDictType

    kind = ShardingStrategy.FULL_SHARD if len(mesh) == 1 else ShardingStrategy.HYBRID_SHARD
    model = FullyShardedDataParallel(
        model, device_mesh=device_mesh, sharding_strategy=kind, device_id=torch.device("cpu"), use_orig_params=False
    )
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig())
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=json.loads, default=QWEN2, help="JSON of a transformers config")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--strategy", default="fsdp2", choices=("fsdp", "fsdp2"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reference", action="store_true")
    args = parser.parse_args()
    make_checkpoint(
        args.out, args.config, world_size=args.world_size, strategy=args.strategy, dtype=args.dtype,
        reference=args.reference,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Real sharded checkpoints without a training run: FSDP, FSDP2 or chosen placements over gloo, saved as verl does.

`python -m tests.support.sharding OUT --world-size 4 --strategy fsdp2 …` writes `OUT/actor/…` in
verl's layout and, with `--reference`, `OUT/reference`: the same model, unsharded, through
transformers' own `save_pretrained`. With `lora` it is a PEFT model, and `reference` what
PEFT's own `merge_and_unload` makes of it; `OUT/base` and `OUT/adapter` are its two parts.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
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
WIDE = QWEN2 | {"vocab_size": 60_000, "hidden_size": 512}  # long enough to be killed in
LARGE_INT = 2**16 + 3  # float16 holds no such number, bfloat16 would round it


def make_checkpoint(out: Path, config: dict[str, Any], *, world_size: int = 2, **options: Any) -> Path:
    """A checkpoint of a randomly initialised model under `out`; returns `out`. For `options` see `_make`."""
    make_checkpoints({out: {"config": config, **options}}, world_size)
    return out


def make_checkpoints(cases: dict[Path, dict[str, Any]], world_size: int) -> None:
    """One for each of `cases`, where to → arguments of `_make`, all by the same processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_rank, args=(cases, world_size, port), nprocs=world_size, start_method="spawn")


def build(config: dict[str, Any], dtype: str, scale: float = 0.05) -> Any:
    """The unsharded model, the same on every rank; values are normal, `scale` their deviation."""
    import transformers
    from transformers import AutoConfig

    values = dict(config)
    hf_config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = getattr(transformers, config["architectures"][0])(hf_config).to(getattr(torch, dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p, dtype=torch.float32) * scale)  # norms too: no value may be a default
        for b in (b for name, b in model.named_buffers() if name in model.state_dict()):
            b.fill_(LARGE_INT) if b.dtype == torch.int64 else b.uniform_(0.5, 1.5)
    return model


def _rank(rank: int, cases: dict[Path, dict[str, Any]], world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for out, case in cases.items():
        _make(rank, world, out, **case)
    dist.destroy_process_group()


def _make(
    rank: int, world: int, out: Path, *, config: dict[str, Any], strategy: str = "fsdp2", dtype: str = "float32",
    mesh: tuple[int, ...] = (), reference: bool = True, role: str = "actor", saved: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None, lora_only: bool = False, zero: bool = False, live: str | None = None,
    scale: float = 0.05, offload: bool = False,
) -> None:  # fmt: skip
    """`strategy`: `fsdp`, `fsdp2`, or `placed`: matrices sharded on their inner dimensions, vectors plain, or
    `unpacked`: the same with the names on disk.

    A two-dimensional `mesh` makes FSDP into HSDP and shards `placed` twice. `saved` overrides
    keys of the config.json beside the shards. `lora`: arguments of PEFT's `LoraConfig`; `lora_only`
    saves as verl's `save_lora_only`, `zero` leaves lora_B as it begins. `live`: the live source's copy
    of the same weights, cast to that dtype, goes to `out/live`. `offload`: FSDP2's CPUOffloadPolicy.
    """
    model = build(config, dtype, scale)
    actor = out / role
    if lora is not None:
        model = _add_lora(model, lora, zero, out if rank == 0 else None)
    if rank == 0:
        (actor / "huggingface").mkdir(parents=True)
        model.config.save_pretrained(actor / "huggingface")
        saved_config = actor / "huggingface/config.json"
        saved_config.write_text(json.dumps(json.loads(saved_config.read_text()) | (saved or {}), indent=2))
        if model.can_generate():
            model.generation_config.save_pretrained(actor / "huggingface")
        (actor / "fsdp_config.json").write_text(
            json.dumps({"FSDP_version": 1 if strategy == "fsdp" else 2, "world_size": world})
        )
        if lora is not None:
            meta = {"r": lora["r"], "lora_alpha": int(lora["lora_alpha"]), "task_type": "CAUSAL_LM"}
            (actor / "lora_train_meta.json").write_text(json.dumps(meta, indent=4))
        elif reference:
            model.save_pretrained(out / "reference")
    dist.barrier()
    sharded = _shard(model, strategy, mesh or (world,), offload)
    if live:
        _copy_live(sharded, rank, live, out / "live")
    shards = sharded if isinstance(sharded, dict) else sharded.state_dict()
    if lora_only:
        shards = {k: v for k, v in shards.items() if "lora_" in k or ".adapter_" in k}
    torch.save(shards, actor / f"model_world_size_{world}_rank_{rank}.pt")
    dist.barrier()


def _add_lora(model: Any, lora: dict[str, Any], zero: bool, out: Path | None) -> Any:
    """The PEFT model, its adapter random; with `out` its parts and what PEFT merges them to are written there."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    if out is not None:
        model.save_pretrained(out / "base")
    dtype = model.dtype
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), autocast_adapter_dtype=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not (zero and "lora_B" in name):
                p.copy_((p if "magnitude" in name else 0) + torch.randn(p.shape) * 0.1)
            assert p.dtype == dtype, name  # as verl casts them
    if out is not None:
        model.save_pretrained(out / "adapter")
        deepcopy(model).merge_and_unload().save_pretrained(out / "reference")
    return model


def _copy_live(module: Any, rank: int, dtype: str, folder: Path) -> None:
    """What a worker does: take the memory, change the weights for the copy's sake, copy, go on with training."""
    from verl_autoexport.sources.live.copier import Copier, held_parts

    folder.mkdir(exist_ok=True)
    names = [part.fqn for part, _ in held_parts(module, rank)]
    copier = Copier(module, rank, dict.fromkeys(names, dtype), 1 << 14)
    copier.allocate()
    with torch.no_grad():
        before = [p.detach().clone() for p in module.parameters()]
        for p in module.parameters():
            p.mul_(2)
        copier.copy()()  # the memory is used again for the next one
        for p, old in zip(module.parameters(), before, strict=True):
            p.copy_(old)
        copier.copy()()
        for p in module.parameters():
            p.add_(1)  # training goes on
        for number, chunk in enumerate(copier.chunks):
            chunk.numpy().tofile(folder / f"{rank}-{number}.bin")
        for p, old in zip(module.parameters(), before, strict=True):
            p.copy_(old)
    (folder / f"{rank}.layout").write_bytes(pickle.dumps(copier.layout))


def _shard(model: Any, strategy: str, mesh: tuple[int, ...], offload: bool) -> Any:
    """The sharded module, or for `placed` and `unpacked` its state dict."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.core_model_loading import revert_weight_conversion

    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("fsdp",) if len(mesh) == 1 else ("ddp", "fsdp"))
    if strategy in ("placed", "unpacked"):
        state = model.state_dict() if strategy == "placed" else revert_weight_conversion(model, model.state_dict())
        return {name: _place(tensor, device_mesh) for name, tensor in state.items()}
    if strategy == "fsdp2":
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        policy = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
        bare = model.get_base_model() if hasattr(model, "peft_config") else model
        for layer in getattr(getattr(bare, "model", None), "layers", ()):
            fully_shard(layer, mesh=device_mesh, offload_policy=policy)
        return fully_shard(model, mesh=device_mesh, offload_policy=policy)
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, ShardingStrategy, StateDictType

    kind = ShardingStrategy.FULL_SHARD if len(mesh) == 1 else ShardingStrategy.HYBRID_SHARD
    mixed = len({p.requires_grad for p in model.parameters()}) > 1 and not hasattr(model, "peft_config")
    model = FullyShardedDataParallel(
        model, device_mesh=device_mesh, sharding_strategy=kind, device_id=torch.device("cpu"), use_orig_params=mixed,
        auto_wrap_policy=_lora_units if hasattr(model, "peft_config") else None,
    )  # fmt: skip
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig())
    return model


def _lora_units(module: Any, recurse: bool, nonwrapped_numel: int) -> bool:
    """verl's policy for LoRA: every trained leaf is a unit of its own, apart from the frozen weights."""
    weight = getattr(module, "weight", None)
    return recurse or (not list(module.named_children()) and weight is not None and weight.requires_grad)


def _place(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """Sharded on dimension 1, or, over a two-dimensional mesh, on the last two."""
    from torch.distributed.tensor import DTensor, Shard

    if tensor.ndim < 2:
        return tensor
    dims = [1] if mesh.ndim == 1 else [tensor.ndim - 2, tensor.ndim - 1]
    local = tensor
    for i, dim in enumerate(dims):
        chunks = local.chunk(mesh.size(i), dim)
        mine = mesh.get_local_rank(i)
        local = chunks[mine] if mine < len(chunks) else local.narrow(dim, 0, 0)
    return DTensor.from_local(
        local.contiguous(), mesh, [Shard(d) for d in dims], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=json.loads, default=QWEN2, help="JSON of a transformers config")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--strategy", default="fsdp2", choices=("fsdp", "fsdp2", "placed"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reference", action="store_true")
    args = parser.parse_args()
    make_checkpoint(
        args.out, args.config, world_size=args.world_size, strategy=args.strategy, dtype=args.dtype,
        reference=args.reference,
    )  # fmt: skip


if __name__ == "__main__":
    main()

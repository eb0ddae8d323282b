"""What a live milestone costs training: stall, slow-down of compute beside it, against torch's own ways to save.

`python tests/benchmarks/bench_live.py [--layers 36] [--repeat 5]` on a machine with one GPU
and torch and transformers; needs no ray and no verl. A Qwen2 of 3.4 B fp32 parameters is
sharded by FSDP2 over the one GPU. Prints a table of medians; times are in seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))
from verl_autoexport.sources.live import Copier

CHUNK = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    model = _model(args.layers)
    numel = sum(p.numel() for p in model.parameters())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {numel / 1e9:.2f} B fp32 parameters, FSDP2")
    rows: dict[str, float] = {}
    limit = _pinned_limit(numel * 2, args.repeat)
    rows["pinned device-to-host copy of the bf16 bytes (the limit)"] = limit
    for clone in (False, True):
        _copies(model, clone, args.repeat, rows)
    _others(model, rows)
    rows["live, parameters just offloaded to the CPU: stall of training"] = _offloaded(model, args.repeat)
    for name, seconds in rows.items():
        print(f"{name:64} {seconds:9.4f}  {seconds / limit:8.2f} x")
    dist.destroy_process_group()


def _model(layers: int) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _pinned_limit(nbytes: int, repeat: int) -> float:
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return _median(lambda: host.copy_(device, non_blocking=True), repeat)


def _copies(model: torch.nn.Module, clone: bool, repeat: int, rows: dict[str, float]) -> None:
    named = f"live, {'device clone' if clone else 'straight to pinned memory'}"
    names = dict.fromkeys(model.state_dict(), "bfloat16")
    copier = Copier(model, 0, names, CHUNK, clone)
    started = time.monotonic()
    copier.allocate()
    rows[f"{named}: taking the memory (once, in the background)"] = time.monotonic() - started
    copier.copy()()
    stalls, finishes = [], []
    for _ in range(repeat):
        torch.cuda.synchronize()
        started = time.monotonic()
        finish = copier.copy()
        stalls.append(time.monotonic() - started)
        finish()
        finishes.append(time.monotonic() - started)
    rows[f"{named}: stall of training"] = statistics.median(stalls)
    rows[f"{named}: until it is in host memory"] = statistics.median(finishes)
    _check(model, copier)
    if clone:
        alone, beside = _slow_down(copier, repeat)
        rows["compute loop alone"] = alone
        rows["compute loop beside the copy"] = beside
        print(f"compute loop beside the copy: {100 * (beside / alone - 1):+.1f} %")


def _check(model: torch.nn.Module, copier: Copier) -> None:
    """The bits are those of the weights cast to bf16."""
    state = model.state_dict()
    for part in copier.layout.parts:
        values = state[part.fqn].to_local().reshape(-1)[part.start : part.start + part.numel].bfloat16().cpu()
        copy = copier.chunks[part.chunk][part.offset : part.offset + part.nbytes].view(torch.bfloat16)
        assert torch.equal(values, copy), part.fqn


def _slow_down(copier: Copier, repeat: int) -> tuple[float, float]:
    """Seconds of matrix products that take about as long as the copy behind them: alone, and beside it."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def compute() -> None:
        for _ in range(90):
            torch.mm(a, b)
        torch.cuda.current_stream().synchronize()

    compute()
    alone, beside = [], []
    for _ in range(repeat):
        torch.cuda.synchronize()
        started = time.monotonic()
        compute()
        alone.append(time.monotonic() - started)
        thread = threading.Thread(target=copier.copy())
        started = time.monotonic()
        thread.start()
        compute()
        beside.append(time.monotonic() - started)
        thread.join()
    return statistics.median(alone), statistics.median(beside)


def _others(model: torch.nn.Module, rows: dict[str, float]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        future = dcp.async_save({"model": model.state_dict()}, checkpoint_id=f"{folder}/dcp")
        rows["torch.distributed.checkpoint.async_save: stall"] = time.monotonic() - started
        future.result()
        started = time.monotonic()
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(f"{folder}/hf", state_dict={k: v.bfloat16() for k, v in full.items()})
        rows["gather and save_pretrained, as verl's hf_model: stall"] = time.monotonic() - started


def _offloaded(model: torch.nn.Module, repeat: int) -> float:
    """As verl offloads: without waiting for the copies to the host, which the snapshot must do."""
    stalls = []
    for _ in range(repeat):
        model.to("cuda")
        copier = Copier(model, 0, dict.fromkeys(model.state_dict(), "bfloat16"), CHUNK)
        copier.allocate()
        torch.cuda.synchronize()
        model.to("cpu", non_blocking=True)
        started = time.monotonic()
        copier.copy()()
        stalls.append(time.monotonic() - started)
        _check(model, copier)
    return statistics.median(stalls)


def _median(call: Callable[[], object], repeat: int) -> float:
    call()
    seconds = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        started = time.monotonic()
        call()
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()

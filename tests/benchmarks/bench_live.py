"""What a live milestone costs training: stall, slow-down beside the copy and beside the merge, host memory.

`python -m tests.benchmarks.bench_live` from the root of the repository, on a machine with one
GPU and torch, transformers, safetensors and numpy; needs no ray and no verl. A Qwen2 of 3.4 B
fp32 parameters is sharded by FSDP2 over the one GPU and compared with torch's own ways to
save. Prints one Markdown table; times are medians of `--repeat`. `--layers 2 --hidden 64
--vocabulary 1000` makes a small model, which also runs on a CPU.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.support.repository import environment
from verl_autoexport.merge.job import MergeJob
from verl_autoexport.merge.plan import Output, make_plan, whole
from verl_autoexport.sources.live.copier import Copier, make_manifest

CHUNK = 64 << 20
SHARD = 5 * 10**9  # bytes of an exported file, as `weights.max_shard_size` has it
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHARED = Path("/dev/shm")


class Table:
    """Rows of (what, value, of the limit)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.limit = float("nan")

    def seconds(self, what: str, value: float) -> None:
        self.rows.append((what, f"{value:.4f} s", f"{value / self.limit:.2f}"))
        print(f"  {what}: {value:.4f} s", file=sys.stderr, flush=True)

    def other(self, what: str, value: str) -> None:
        self.rows.append((what, value, ""))
        print(f"  {what}: {value}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        lines = ["| | measured | of the limit |", "|---|---|---|"]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of a training step")
    parser.add_argument("--folder", type=Path, help="where files are written; default: the temporary directory")
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", rank=0, world_size=1)
    model = _model(args.layers, args.hidden, args.vocabulary)
    numel, table = sum(p.numel() for p in model.parameters()), Table()
    name = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{name}, {os.cpu_count()} CPUs, torch {torch.__version__}, {numel / 1e9:.3f} B fp32 parameters, FSDP2\n")
    table.limit = _pinned_limit(numel * 2, args.repeat)
    table.seconds("copying the bf16 bytes from the device to page-locked memory: the limit", table.limit)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _live(model, args.repeat, args.tokens, Path(folder), table)
        _others(model, Path(folder), table)
    table.seconds("live, parameters just offloaded to the CPU: stall", _offloaded(model, args.repeat))
    print(table)
    dist.destroy_process_group()


def _model(layers: int, hidden: int, vocabulary: int) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=11008 * hidden // 2048, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("fsdp",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _pinned_limit(nbytes: int, repeat: int) -> float:
    device = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE).random_()
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=GPU)
    return _median(lambda: host.copy_(device, non_blocking=True), repeat)


def _copier(model: torch.nn.Module, clone: bool) -> Copier:
    return Copier(model, 0, dict.fromkeys(model.state_dict(), "bfloat16"), CHUNK, clone)


def _live(model: torch.nn.Module, repeat: int, tokens: int, folder: Path, table: Table) -> None:
    """Straight copies with what they take of host memory, then with the device clone and beside compute."""
    before = _memory()
    straight = _copier(model, clone=False)
    _copies(straight, "live", repeat, table)
    sampled = []
    with _sampled(sampled):
        for _ in range(repeat):
            straight.copy()()
    _check(model, straight)
    size = straight.layout.nbytes
    table.other("live: the buffer, and in page-locked memory", f"{_gb(size)}, {_gb(straight.layout.page_locked_bytes)}")
    for kind, now in _memory().items():
        most = max(sample[kind] for sample in sampled)
        grown = f"{_gb(now - before[kind])}; {_gb(most - before[kind])}"
        table.other(f"live: growth of {kind} with the buffer; the most while copying", grown)
    clone = _copier(model, clone=True)
    _copies(clone, "live with queue.device_clone", repeat, table)
    _check(model, clone)
    alone, beside = _beside_copy(clone, repeat)
    table.other("compute loop beside the copy", f"{100 * (beside / alone - 1):+.2f} %")
    del clone
    _beside_merge(model, straight, repeat, tokens, folder, table)


def _copies(copier: Copier, named: str, repeat: int, table: Table) -> None:
    started = time.monotonic()
    copier.allocate()
    table.seconds(f"{named}: taking the memory, once, in the background", time.monotonic() - started)
    copier.copy()()
    stalls, finishes = [], []
    for _ in range(repeat):
        _synchronize()
        started = time.monotonic()
        finish = copier.copy()
        stalls.append(time.monotonic() - started)
        finish()
        finishes.append(time.monotonic() - started)
    table.seconds(f"**{named}: stall of training**", statistics.median(stalls))
    table.seconds(f"{named}: until it is in host memory", statistics.median(finishes))


def _check(model: torch.nn.Module, copier: Copier) -> None:
    """The bits are those of the weights cast to bf16."""
    state = model.state_dict()
    for part in copier.layout.parts:
        values = state[part.fqn].to_local().reshape(-1)[part.start : part.start + part.numel].bfloat16().cpu()
        copy = copier.chunks[part.chunk][part.offset : part.offset + part.nbytes].view(torch.bfloat16)
        assert torch.equal(values, copy), part.fqn


def _beside_copy(copier: Copier, repeat: int) -> tuple[float, float]:
    """Seconds of matrix products that take about as long as the copy behind them: alone, and beside it."""
    size, times = (8192, 90) if GPU else (256, 5)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def compute() -> None:
        for _ in range(times):
            torch.mm(a, b)
        if GPU:
            torch.cuda.current_stream().synchronize()

    compute()
    alone, beside = [], []
    for _ in range(repeat):
        _synchronize()
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


def _beside_merge(model: torch.nn.Module, copier: Copier, repeat: int, tokens: int, folder: Path, table: Table) -> None:
    """Training steps alone, while a snapshot is handed over to shared memory, and while others merge it there."""
    step = _trainer(model, tokens)
    steps = {"alone": _steps(step, seconds=5.0), "hand-over": [], "merge": []}
    hand_overs, merges = [], []
    for _ in range(max(2, repeat)):
        room = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 1.1 * copier.layout.nbytes
        shared = Path(tempfile.mkdtemp(dir=SHARED if room else folder))
        try:
            finish = copier.copy()
            hand_over = threading.Thread(target=_hand_over, args=(finish, copier, shared))
            hand_over.start()
            started = time.monotonic()
            steps["hand-over"] += _steps(step, while_=hand_over.is_alive)
            hand_over.join()
            hand_overs.append(time.monotonic() - started)
            jobs = _jobs(copier, shared, folder)
            started = time.monotonic()
            merging = [_start(job, shared / f"{i}.job") for i, job in enumerate(jobs)]
            steps["merge"] += _steps(step, while_=lambda merging=merging: any(p.poll() is None for p in merging))
            assert [p.wait() for p in merging] == [0] * len(merging), "a merge failed"
            merges.append(time.monotonic() - started)
            assert all(job.path.stat().st_size == job.planned.nbytes for job in jobs)
        finally:
            shutil.rmtree(shared)
            for path in folder.glob("*.safetensors"):
                path.unlink()
        steps["alone"] += _steps(step, seconds=2.0)
    table.seconds("training step alone", statistics.median(steps["alone"]))
    for name, took in (("hand-over", hand_overs), ("merge", merges)):
        table.seconds(f"{name}, behind training, of {len(merging)} file(s)", statistics.median(took))
        counted = (
            f"**training steps beside the {name}**, median (mean); {len(steps[name])} of {len(steps['alone'])} alone"
        )
        table.other(counted, _slower(steps[name], steps["alone"]))
    model.zero_grad(set_to_none=True)


def _slower(beside: list[float], alone: list[float]) -> str:
    if not beside:
        return "over before a step was"
    median, mean = (f(beside) / f(alone) - 1 for f in (statistics.median, statistics.fmean))
    return f"{100 * median:+.2f} % ({100 * mean:+.2f} %)"


def _trainer(model: torch.nn.Module, tokens: int) -> Callable[[], None]:
    """Forward, backward and SGD with so small a rate that nothing diverges."""
    tokens = tokens if GPU else 32
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize()

    for _ in range(3):
        step()
    return step


def _steps(
    step: Callable[[], None], seconds: float = float("inf"), while_: Callable[[], bool] = lambda: True
) -> list[float]:
    """The seconds of each step that began and ended while it was to be measured."""
    found, began = [], time.monotonic()
    while while_() and time.monotonic() - began < seconds:
        started = time.monotonic()
        step()
        took = time.monotonic() - started
        if while_():
            found.append(took)
    return found


def _hand_over(finish: Callable[[], None], copier: Copier, shared: Path) -> None:
    """As putting it into an object store does: one copy in shared memory."""
    finish()
    for number, chunk in enumerate(copier.chunks):
        chunk.numpy().tofile(shared / f"{number}.bin")


def _jobs(copier: Copier, shared: Path, folder: Path) -> list[MergeJob]:
    files = [shared / f"{number}.bin" for number in range(len(copier.chunks))]
    manifest = make_manifest([copier.layout], [files], "fsdp2", "benchmark")
    tensors = manifest.tensors.values()
    outputs = [Output(t.fqn, t.shape, "bfloat16", whole(t.fqn, t.shape)) for t in tensors]
    plan = make_plan(manifest, outputs, SHARD)
    return [MergeJob(file, manifest, folder / file.name, 1 << 30) for file in plan.files]


def _start(job: MergeJob, path: Path) -> subprocess.Popen[bytes]:
    """A process of its own, as each merge task is; one thread for each CPU that Ray gives it."""
    path.write_bytes(pickle.dumps(job))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')).run()"
    env = environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([sys.executable, "-c", code, str(path)], env=env)


def _others(model: torch.nn.Module, folder: Path, table: Table) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    started = time.monotonic()
    future = dcp.async_save({"model": model.state_dict()}, checkpoint_id=f"{folder}/dcp")
    table.seconds("torch.distributed.checkpoint.async_save: stall", time.monotonic() - started)
    future.result()
    started = time.monotonic()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(f"{folder}/hf", state_dict={k: v.bfloat16() for k, v in full.items()})
    table.seconds("gathering and save_pretrained, as verl's hf_model: stall", time.monotonic() - started)


def _offloaded(model: torch.nn.Module, repeat: int) -> float:
    """As verl offloads: without waiting for the copies to the host, which the snapshot must do."""
    stalls = []
    for _ in range(repeat):
        model.to(DEVICE)
        copier = _copier(model, clone=False)
        copier.allocate()
        _synchronize()
        model.to("cpu", non_blocking=True)
        started = time.monotonic()
        copier.copy()()
        stalls.append(time.monotonic() - started)
        _check(model, copier)
    return statistics.median(stalls)


def _memory() -> dict[str, int]:
    """What the kernel says of this process, in bytes; the driver's page-locked memory shows in one of them."""
    status = Path("/proc/self/status").read_text()
    kinds = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin")
    return {kind: int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) << 10 for kind in kinds}


@contextmanager
def _sampled(into: list[dict[str, int]]) -> Iterator[None]:
    into.append(_memory())
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            into.append(_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def _median(call: Callable[[], object], repeat: int) -> float:
    call()
    seconds = []
    for _ in range(repeat):
        _synchronize()
        started = time.monotonic()
        call()
        _synchronize()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()

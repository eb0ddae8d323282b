"""Exports side by side with verl's merger, torch's consolidation, `cp` and the disk itself.

`python -m tests.benchmarks.bench_export [--case N …] [--repeat 3] [--where DIR]` prints one row a
case, each differing in one thing from the second. What is compared in a row runs in turns, so that other
work on the machine shifts all of it alike; medians. Figures in GB/s are of output. All but
the whole processes run twice in a row, and the second time counts: a virtual machine's host may have
taken back the memory that was free meanwhile, and whoever fills it first waits for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

CASES = [
    ("0.1 B", 8, 0, "float32"), ("0.45 B", 8, 0, "float32"), ("1.5 B", 8, 0, "float32"), ("0.45 B", 2, 0, "float32"),
    ("0.45 B", 32, 0, "float32"), ("0.45 B", 8, 1, "float32"), ("0.45 B", 32, 1, "float32"),
    ("0.45 B", 8, 0, "bfloat16"), ("0.45 B", 8, 1, "bfloat16"),
]  # fmt: skip
"""Parameters, ranks, sharded dimension, dtype of the shards; the output is always bfloat16."""
COLUMNS = (
    "parameters", "ranks", "dim", "shards in", "export s", "verl s", "of verl", "merge GB/s", "cp GB/s", "of cp",
    "all s", "cp, sync, sha s", "of these", "DCP GB/s", "disk GB/s", "export MiB", "verl MiB",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs="+", default=list(range(len(CASES))), help="numbers of rows, from 0")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--where", type=Path, default=Path("."), help="directory on the disk to be measured")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(_child(*args.child))
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for number in args.case:
        with tempfile.TemporaryDirectory(dir=args.where, prefix=".bench-") as work:
            print(f"| {' | '.join(_row(CASES[number], Path(work), args.repeat))} |", flush=True)
    print(_two_workers(args.repeat))


def _row(case: tuple[str, int, int, str], work: Path, repeat: int) -> list[str]:
    size, ranks, dim, dtype = case
    source, out, kept, copy, zeros = (work / name for name in ("actor", "out", "kept", "copy", "zeros"))
    _python("make", source, *case)
    if dtype == "bfloat16":
        _python("make_dcp", work / "dcp", *case)
    merger = ["-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", source, "--target_dir", out]
    export = ["-m", "verl_autoexport", "export", source, "--output", out, "--no-verify"]
    runs: dict[str, Callable[[], float]] = {
        "bare": lambda: float(_python("merge", source, out, "bare")),
        "cp": lambda: _second(copy, "cp", kept, copy),
        "disk": lambda: _second(zeros, "dd", "if=/dev/zero", f"of={zeros}", "bs=16M", f"count={count}", "conv=fsync"),
        "all": lambda: float(_python("merge", source, out, "all")),
        "three": lambda: _second(copy, "bash", "-c", f"cp {kept} {copy} && sync -f {copy} && sha256sum {kept}"),
    }
    if dtype == "bfloat16":
        runs["dcp"] = lambda: float(_python("dcp", work / "dcp", out))
    found: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    _python("merge", source, work / "first", "bare")
    (work / "first/model.safetensors").rename(kept)
    nbytes = kept.stat().st_size
    count = nbytes // (16 << 20)
    for _ in range(repeat):
        for name, run in runs.items():
            found.setdefault(name, []).append(run())
            _clean(out, copy, zeros)
        for name, command in {"export": export, "verl": merger}.items():
            took, peak = _measure([sys.executable, *map(str, command)])
            found.setdefault(name, []).append(took)
            memory.setdefault(name, []).append(peak)
            _clean(out)
    s = {name: statistics.median(values) for name, values in found.items()}
    rate = {name: f"{nbytes / s[name] / 1e9:.2f}" if name in s else "" for name in ("bare", "cp", "dcp", "disk")}
    mib = [f"{(statistics.median(memory[name]) - _imports()) / 2**20:.0f}" for name in ("export", "verl")]
    return [
        size, str(ranks), str(dim), dtype, f"{s['export']:.2f}", f"{s['verl']:.2f}", f"{s['export'] / s['verl']:.2f}",
        rate["bare"], rate["cp"], f"{s['cp'] / s['bare']:.2f}", f"{s['all']:.2f}", f"{s['three']:.2f}",
        f"{s['all'] / s['three']:.2f}", rate["dcp"], rate["disk"], *mib,
    ]  # fmt: skip


def _two_workers(repeat: int) -> str:
    """Two files in memory, merged by one worker and two, of one thread each."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=".bench-") as work:
        source, found = Path(work) / "actor", {"1": [], "2": []}
        _python("make", source, "0.45 B", 4, 0, "float32")
        for _ in range(repeat):
            for workers, seconds in found.items():
                seconds.append(float(_python("merge", source, Path(work) / "out", "all", workers, 1)))
                _clean(Path(work) / "out")
    one, two = (statistics.median(seconds) for seconds in found.values())
    return f"0.45 B in two files on tmpfs: one worker of one thread {one:.2f} s, two {two:.2f} s: {one / two:.2f} x"


def _child(what: str, *args: str) -> float | str:
    """In a process of its own: make a checkpoint, or do one thing and tell its seconds."""
    import torch

    if what in ("make", "make_dcp"):
        from tests.benchmarks.large import write_dcp, write_verl

        write = write_verl if what == "make" else write_dcp
        write(Path(args[0]), args[1], int(args[2]), int(args[3]), getattr(torch, args[4]))
        return ""
    if what == "dcp":
        return _consolidate(Path(args[0]), Path(args[1]))
    return _merge(Path(args[0]), Path(args[1]), args[2] == "bare", *(int(n) for n in args[3:]))


def _merge(source: Path, out: Path, bare: bool, workers: int = 1, threads: int | None = None) -> float:
    """The merge alone; `bare`: without hash and flushing. Several files only where the threads are given."""
    from verl_autoexport.export import pipeline
    from verl_autoexport.export.spec import checkpoint_spec
    from verl_autoexport.merge import job as merge
    from verl_autoexport.merge.local_runner import LocalRunner
    from verl_autoexport.model.planner import plan_model
    from verl_autoexport.sources.fsdp.rank_files import FsdpFiles

    class NoHash:
        def update(self, data: bytes | memoryview) -> None:
            pass

    class Bare(merge.FileWriter):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.digest = NoHash()

        def send(self, end: int) -> None:
            self.advised = end

        def finish(self) -> tuple[str, int]:
            return "", self.hashed

    spec = checkpoint_spec(source, verify=False, max_shard_size="480MB" if threads else "50GB")
    planned = plan_model(spec.options, spec.checkpoint, spec.saved, FsdpFiles(source).manifest())
    if bare:
        merge.FileWriter = Bare
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        jobs = pipeline._jobs(spec, planned, out)
        start = time.perf_counter()
        LocalRunner(workers, threads).run(jobs, lambda nbytes: None)
        took = time.perf_counter() - start
    return took


def _consolidate(source: Path, out: Path) -> float:
    from safetensors import safe_open
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    with safe_open(next(source.iterdir()), "pt") as file:
        names = dict.fromkeys(file.keys(), 1)
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        start = time.perf_counter()
        consolidate_safetensors_files(str(source), str(out), names)
        took = time.perf_counter() - start
    return took


def _python(*args: object) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.bench_export", "--child", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def _timed(*command: object) -> float:
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return time.perf_counter() - start


def _second(made: Path, *command: object) -> float:
    _timed(*command)
    made.unlink()
    return _timed(*command)


def _clean(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()  # what one leaves to be written is not the next one's to wait for


def _measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds, and peak anonymous bytes (RssAnon) of the process tree, sampled every 20 ms."""
    peak, over = 0, threading.Event()
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, _anonymous(process.pid))

    thread = threading.Thread(target=sample)
    thread.start()
    _, errors = process.communicate()
    took = time.monotonic() - start
    over.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{errors.decode()[-2000:]}")
    return took, peak


def _anonymous(pid: int) -> int:
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    except (psutil.Error, OSError):
        pass  # ended while being looked at
    return total


def _imports() -> int:
    """Anonymous bytes of a process that has imported what an export needs."""
    code = (
        "import transformers, verl_autoexport.export.pipeline as p; from transformers import Qwen2ForCausalLM; "
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('RssAnon')))"
    )
    return int(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)) * 1024


if __name__ == "__main__":
    main()

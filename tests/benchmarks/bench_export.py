"""Whole-process export of one checkpoint, side by side with verl's merger and `cp` of the output.

`python tests/benchmarks/bench_export.py [--checkpoint DIR] [--repeat 3]`; without a
checkpoint a 0.45 B fp32 model in 4 FSDP2 shards is made first. Rounds are interleaved and
medians reported, since other work on the machine shifts all of them alike.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from sharding import QWEN2, make_checkpoint

HALF_B = QWEN2 | {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 12,
    "num_attention_heads": 14, "max_position_embeddings": 2048,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="an actor/ directory")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as tmp:
        work = Path(tmp)
        source = args.checkpoint
        if source is None:
            source = make_checkpoint(work / "checkpoint", HALF_B, world_size=4, reference=False) / "actor"
        _run(source, work, args.repeat)


def _run(source: Path, work: Path, repeat: int) -> None:
    ours, theirs, copy = work / "ours", work / "theirs", work / "copy"
    commands = {
        "verl-autoexport export --no-verify": (
            ours,
            [sys.executable, "-m", "verl_autoexport", "export", source, "--output", ours, "--no-verify"],
        ),
        "verl.model_merger merge": (
            theirs,
            [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", source,
             "--target_dir", theirs],
        ),
        "cp of the output": (copy, ["cp", "-r", ours, copy]),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, int] = dict.fromkeys(commands, 0)
    for _ in range(repeat):
        for target, _command in commands.values():
            shutil.rmtree(target, ignore_errors=True)
        for name, (_target, command) in commands.items():
            took, peak = _measure([str(c) for c in command])
            seconds[name].append(took)
            memory[name] = max(memory[name], peak)
    base = statistics.median(seconds["verl.model_merger merge"])
    print(f"{'':36} {'seconds':>8} {'x merger':>9} {'peak anonymous':>15}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:36} {median:8.2f} {median / base:9.2f} {memory[name] / 2**30:11.2f} GiB")


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


if __name__ == "__main__":
    main()

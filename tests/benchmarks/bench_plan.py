"""What a plan costs as models and world sizes grow, from synthetic metadata: no file is read or written.

`python -m tests.benchmarks.bench_plan` plans mixtures of experts of up to 671 B parameters on
up to 1,024 ranks, laid out evenly, and one layout in which every piece stands for itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from verl_autoexport.merge.plan import MergePlan, Output, make_plan, whole
from verl_autoexport.shards.manifest import Shard, ShardManifest, TensorEntry, check_coverage, join_runs

Tensors = list[tuple[str, tuple[int, int]]]


def experts(
    layers: int, number: int, hidden: int, inner: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of a mixture of experts."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "lm_head.weight", (vocabulary, hidden)
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}.weight", (hidden, hidden)
        for expert in range(number):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            yield f"{prefix}.gate_proj.weight", (inner, hidden)
            yield f"{prefix}.up_proj.weight", (inner, hidden)
            yield f"{prefix}.down_proj.weight", (hidden, inner)


def even(tensors: Tensors, ranks: int, dim: int = 0) -> ShardManifest:
    """Every tensor in equal parts over all ranks, each range of ranks as one Shard."""
    entries, offset = {}, 0
    for name, shape in tensors:
        local = tuple(n // ranks if d == dim else n for d, n in enumerate(shape))
        entries[name] = TensorEntry(name, "float32", shape, (Shard(0, (0, 0), local, 0, offset, ranks, dim),))
        offset += local[0] * local[1] * 4
    return ShardManifest((), entries, ranks, "fsdp2", "")


def explicit(tensors: Tensors, ranks: int) -> ShardManifest:
    """The same, each piece at a place of its own, so that no range can stand for several."""
    entries = {}
    for name, (rows, columns) in tensors:
        step = rows // ranks
        shards = [Shard(r, (r * step, 0), (step, columns), r, 64 * (r % 3)) for r in range(ranks)]
        entries[name] = TensorEntry(name, "float32", (rows, columns), join_runs(shards))
    return ShardManifest((), entries, ranks, "fsdp2", "")


def plan(manifest: ShardManifest) -> MergePlan:
    """All of it: the shards tile the tensors, the tensors tile the files, files and headers."""
    for entry in manifest.tensors.values():
        check_coverage(entry)
    outputs = [Output(name, t.shape, "bfloat16", whole(name, t.shape)) for name, t in manifest.tensors.items()]
    return make_plan(manifest, outputs, 5 * 10**9)


def main() -> None:
    small = list(experts(28, 1, 1024, 3072, 155648))
    large = list(experts(61, 256, 7168, 2048, 129024))  # 671 B parameters, all layers of experts
    hundred = list(experts(128, 260, 1024, 1024, 131072))
    cases = {
        "0.5 B on 8 ranks": lambda: even(small, 8),
        "0.5 B on 1,024 ranks": lambda: even(small, 1024),
        "671 B on 1,024 ranks": lambda: even(large, 1024),
        "671 B on 1,024 ranks, dimension 1": lambda: even(large, 1024, dim=1),
        "100,000 tensors on 1,024 ranks": lambda: even(hundred, 1024),
        "10⁶ pieces, none like another": lambda: explicit(hundred[2:979], 1024),
    }
    print(f"| {'model':34} | {'tensors':>8} | {'pieces':>11} | {'files':>5} | {'seconds':>7} |\n|---|---|---|---|---|")
    for name, make in cases.items():
        manifest, took = make(), []
        for _ in range(3):
            start = time.perf_counter()
            planned = plan(manifest)
            took.append(time.perf_counter() - start)
        pieces = sum(s.count for t in manifest.tensors.values() for s in t.shards)
        cells = f"{len(manifest.tensors):8,} | {pieces:11,} | {len(planned.files):5}"
        print(f"| {name:34} | {cells} | {statistics.median(took):7.2f} |")


if __name__ == "__main__":
    main()

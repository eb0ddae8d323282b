"""Exports of real sharded checkpoints against transformers' own: tensor for tensor, config key for key."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import verl_autoexport
from tests.support.checkpoints import CHECKED, STEP
from tests.support.exports import assert_same_model, export, oracle, tensors
from tests.support.page_cache import resident
from tests.support.sharding import LARGE_INT, QWEN2, QWEN3_MOE, make_checkpoint
from verl_autoexport.errors import SourceError
from verl_autoexport.export.pipeline import run_export
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles

DTYPES = ("bfloat16", "float16", "float32", "source")


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


# -- the same model as transformers makes ---------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uneven", "tied", "fsdp1", "hsdp", "moe", "bf16", "buffers", "inner", "grid"])
def test_equals_transformers(name, dtype, checkpoint, tmp_path):
    made = checkpoint(name)
    export(made, tmp_path / "ours", dtype=dtype)
    assert_same_model(tmp_path / "ours", oracle(made / "reference", dtype, tmp_path / "theirs"))


def test_the_cases_are_what_they_claim(checkpoint):
    manifests = {name: FsdpFiles(checkpoint(name) / "actor").manifest() for name in ("uneven", "hsdp", "inner", "grid")}
    uneven = manifests["uneven"].tensors["model.embed_tokens.weight"]
    assert [(s.count, s.shape) for s in uneven.shards] == [(2, (44, 48)), (1, (43, 48))]
    last = {s.rank + s.count - 1 for t in manifests["hsdp"].tensors.values() for s in t.shards}
    assert max(last) == 1  # ranks 2 and 3 are replicas
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert [(s.count, s.dim, s.shape) for s in manifests["inner"].tensors[experts].shards] == [(2, 1, (6, 24, 32))]
    assert [(s.count, s.shape) for s in manifests["grid"].tensors[experts].shards] == [(2, (6, 24, 16))] * 2
    assert {m.backend for m in manifests.values()} == {"fsdp2"}
    assert FsdpFiles(checkpoint("fsdp1") / "actor").manifest().backend == "fsdp"


def test_integers_are_not_cast(checkpoint, tmp_path):
    export(checkpoint("buffers"), tmp_path / "out", dtype="float16")
    counters = {k: t for k, t in tensors(tmp_path / "out").items() if not t.is_floating_point()}
    assert counters
    assert all(t.dtype == torch.int64 and t.item() == LARGE_INT for t in counters.values())


def test_architecture_as_fsdp2_renames_it(own_checkpoint, tmp_path):
    made = own_checkpoint("tied")
    config = made / "actor/huggingface/config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "FSDPQwen2ForCausalLM"))
    assert export(made, tmp_path / "ours").architectures == ("Qwen2ForCausalLM",)
    assert_same_model(tmp_path / "ours", oracle(made / "reference", "bfloat16", tmp_path / "theirs"))


# -- files, record, memory ------------------------------------------------------------------


def test_files_and_index(checkpoint, tmp_path):
    limit = 40_000
    made = checkpoint("moe")
    record = export(made, tmp_path / "out", max_shard_size=str(limit), workers=2)
    whole = export(made, tmp_path / "whole")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))
    ]
    assert len(files) > 2
    held, sizes = {}, []
    for file in files:
        with safe_open(file, "pt") as f:
            held |= dict.fromkeys(f.keys(), file.name)
            sizes.append(sum(f.get_tensor(k).nbytes for k in f.keys()))  # noqa: SIM118 - no mapping
    assert index["weight_map"] == held
    assert index["metadata"] == {"total_parameters": record.num_parameters, "total_size": sum(sizes)}
    assert max(sizes) <= limit
    assert record.num_parameters == whole.num_parameters == sum(sizes) // 2
    assert_same_model(tmp_path / "out", tmp_path / "whole")
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


def test_a_tensor_above_the_limit_gets_its_own_file(checkpoint, tmp_path):
    export(checkpoint("uneven"), tmp_path / "out", max_shard_size="1KB")
    weight_map = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    big = weight_map["model.embed_tokens.weight"]
    assert [k for k, v in weight_map.items() if v == big] == ["model.embed_tokens.weight"]
    assert_same_model(tmp_path / "out", oracle(checkpoint("uneven") / "reference", "bfloat16", tmp_path / "theirs"))


def test_any_number_of_workers_writes_the_same_bytes(checkpoint, tmp_path):
    for workers in (1, 2):
        export(checkpoint("inner"), tmp_path / f"{workers}", max_shard_size="50KB", workers=workers)
        (tmp_path / f"{workers}/export.json").unlink()  # tells the time
    assert len(digests(tmp_path / "1")) > 4
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.parametrize("budget", ["64KiB", "1GiB"])
def test_any_budget_writes_the_same_bytes(budget, checkpoint, tmp_path):
    export(checkpoint("grid"), tmp_path / "out", dtype="float32", memory_budget=budget)
    assert_same_model(tmp_path / "out", oracle(checkpoint("grid") / "reference", "float32", tmp_path / "theirs"))


def test_record(checkpoint, tmp_path):
    made = checkpoint("uneven")
    record = verl_autoexport.export_checkpoint(made, tmp_path / "out", base_model="org/base", workers=1)
    written = json.loads((tmp_path / "out/export.json").read_text())
    assert verl_autoexport.ExportRecord.from_dict(written) == verl_autoexport.ExportRecord.from_dict(record.to_dict())
    (tmp_path / "out/export.json").unlink()  # lists every file but itself
    assert {f["name"]: f["sha256"] for f in written["files"]} == digests(tmp_path / "out")
    assert all(f["bytes"] == (tmp_path / "out" / f["name"]).stat().st_size for f in written["files"])
    assert written["num_parameters"] == sum(t.numel() for t in tensors(made / "reference").values())
    assert (written["step"], written["version"], written["dtype"]) == (STEP, 0, "bfloat16")
    assert (written["architectures"], written["base_model"]) == (["Qwen2ForCausalLM"], "org/base")
    assert written["triggers"] == [{"policy": "command", "reason": "exported by hand"}]
    source = {k: v for k, v in written["source"].items() if k != "fingerprint"}
    assert source == {"kind": "checkpoint", "path": str(made / "actor"), "world_size": 3, "backend": "fsdp2"}
    assert written["timings_s"].keys() >= {"stall", "gather", "merge", "verify"}
    assert written["timings_s"]["verify"] > 0
    assert written["versions"]["torch"] == torch.__version__
    assert any("no tokenizer" in note for note in written["notes"])
    assert {k: v["status"] for k, v in written["verification"].items()} == CHECKED


def test_files_beside_the_config_are_copied(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    model_dir = made / "actor/huggingface"
    extra = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "more/data.txt": "of the run"}
    for name, text in extra.items():
        (model_dir / name).parent.mkdir(exist_ok=True)
        (model_dir / name).write_text(text)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (model_dir / name).write_text("stale weights")
    (model_dir / "_fsdp_init.py").write_text("code that no auto_map leads to")
    (tmp_path / "secret").write_text("not ours to publish")
    (model_dir / "link.txt").symlink_to(tmp_path / "secret")
    record = export(made, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in extra} == extra
    assert not [p for kind in ("*.bin", "link.txt", "*.py") for p in tmp_path.glob(f"out/{kind}")]
    assert (tmp_path / "out/model.safetensors").read_bytes() != b"stale weights"
    assert not any("tokenizer" in note for note in record.notes)
    assert {f["name"] for f in record.files} > extra.keys()


CHILD = """
import sys, transformers.models.qwen2.modeling_qwen2, transformers.models.qwen3_moe.modeling_qwen3_moe
from verl_autoexport.export.pipeline import export_checkpoint
print("imported", flush=True)
sys.stdin.readline()
export_checkpoint(sys.argv[1], sys.argv[2], dtype="float32", verify=False, workers=1, memory_budget="32MiB")
"""


BIG = {
    "many": QWEN2 | {"vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
    "one": QWEN3_MOE  # each packed expert tensor is four times the budget
    | {"num_hidden_layers": 1, "num_experts": 16, "hidden_size": 1024, "moe_intermediate_size": 1024},
}  # fmt: skip


def test_files_are_divided_as_save_pretrained_divides_them(checkpoint, tmp_path):
    """Tensors in the middle are larger than a file may be: what is small goes on in the file before them."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("even") / "reference", dtype=torch.float32)
    sizes = sorted(t.nbytes for t in reference.state_dict().values())
    for limit in (sizes[-1] - 1, sizes[len(sizes) // 2], sizes[0]):
        export(checkpoint("even"), tmp_path / f"out{limit}", dtype="float32", max_shard_size=limit)
        reference.save_pretrained(tmp_path / f"ref{limit}", max_shard_size=limit)
        ours, theirs = (
            json.loads((tmp_path / f"{d}{limit}/model.safetensors.index.json").read_text()) for d in ("out", "ref")
        )
        assert ours["weight_map"] == theirs["weight_map"]


@pytest.mark.parametrize("model", BIG)
def test_memory_stays_within_the_budget(model, tmp_path):
    made = make_checkpoint(tmp_path / "made", BIG[model])
    command = [sys.executable, "-c", CHILD, made, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "imported\n"
        before = peak = anonymous_memory(child.pid)
        child.stdin.write("\n")
        child.stdin.close()
        while child.poll() is None:
            peak = max(peak, anonymous_memory(child.pid))
            time.sleep(0.002)
    assert child.returncode == 0
    assert (tmp_path / "out/model.safetensors").stat().st_size > 200e6
    assert peak - before < 32 << 20  # the budget
    assert_same_model(tmp_path / "out", made / "reference")


def anonymous_memory(pid: int) -> int:
    """Bytes; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.parametrize("fails", [False, True])
def test_an_export_in_a_run_leaves_nothing_in_the_page_cache(own_checkpoint, tmp_path, fails):
    checkpoint, out = own_checkpoint("even"), tmp_path / "out"
    spec = replace(checkpoint_spec(checkpoint, verify=False), cached=False)
    out.mkdir()
    shards = sorted(spec.checkpoint.glob("*.pt"))
    if fails:
        content = bytearray(shards[0].read_bytes())
        content[len(content) // 2] ^= 1
        shards[0].write_bytes(content)
    os.sync()
    assert min(map(resident, shards)) > 0.9
    with pytest.raises(SourceError, match="not those that training wrote") if fails else nullcontext():
        run_export(spec, out, LocalRunner(1))
    assert max(map(resident, [*shards, *out.glob("*.safetensors")])) < 0.1

"""One save, one model: what is read of rank files is compared with the checksums that training wrote into them."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.checkpoints import edit, rank_file
from tests.support.exports import assert_same_model, tensors
from tests.support.sharding import QWEN2, QWEN3_MOE, make_checkpoints
from verl_autoexport import export_checkpoint
from verl_autoexport.errors import SourceError
from verl_autoexport.export.pipeline import Silent, export_to_directory
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge import writer
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.merge.reader import equal_values
from verl_autoexport.shards.archive_records import difference, read_records
from verl_autoexport.shards.checksums import Sums
from verl_autoexport.sources.fsdp import rank_files as fsdp_files
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles
from verl_autoexport.sources.nodes.agent import NodeFiles

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
BUDGET = 8 * 4096  # bytes: the smallest blocks, so that a small model has many

# -- the directory of a file -----------------------------------------------------------------


def test_records_are_those_of_the_archive(checkpoint):
    path = rank_file(checkpoint("moe"), 1)
    content, found = path.read_bytes(), read_records(path)
    listed = zipfile.ZipFile(path).infolist()
    assert [(r.name, r.nbytes, r.crc) for r in found] == [(i.filename, i.file_size, i.CRC) for i in listed]
    assert all(zlib.crc32(content[r.begin : r.begin + r.nbytes]) == r.crc for r in found)


# -- identity --------------------------------------------------------------------------------


def test_the_fingerprint_is_the_contents(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    before = FsdpFiles(made / "actor").fingerprint
    copied = shutil.copytree(made, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert FsdpFiles(copied / "actor").fingerprint == before
    rewrite(rank_file(made, 1))
    assert FsdpFiles(made / "actor").fingerprint != before


def test_without_checksums_it_is_of_size_and_time(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    unchecked(made, (1,))
    files = FsdpFiles(made / "actor")
    assert [m.checked for m in files.marks] == [True, False]
    os.utime(rank_file(made, 1))
    with pytest.raises(SourceError, match=r"rank_1\.pt changed while being exported"):
        files.check_unchanged()
    record = export(made, tmp_path / "out")
    assert any("content of 1 of 2 rank files could not be checked" in note for note in record.notes)
    assert_same_model(tmp_path / "out", made / "reference")


# -- two saves -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("adapters")
    cases = {
        "lora": {"config": QWEN2, "lora": LORA}, "lora_fsdp1": {"config": QWEN2, "lora": LORA, "strategy": "fsdp"},
        "lora_moe": {"config": QWEN3_MOE, "lora": LORA | {"target_modules": ["q_proj", "v_proj"]}},
    }  # fmt: skip
    make_checkpoints({folder / name: case for name, case in cases.items()}, 2)
    return lambda name: folder / name


@pytest.fixture
def made(own_checkpoint, adapters, tmp_path, name) -> Path:
    found = shutil.copytree(adapters(name), tmp_path / name) if name.startswith("lora") else own_checkpoint(name)
    # Saved again as `another` does it, so that their sizes are the same.
    return edit(found, lambda shards: None, tuple(range(len(list((found / "actor").glob("*.pt"))))))


def another(path: Path) -> bytes:
    """The same file as it would be a few steps later: every value is another one, its size is the same."""
    state = torch.load(path, weights_only=False)
    for tensor in {id(t): t for t in state.values()}.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.mul_(2) if local.is_floating_point() else local.add_(1)
    folder = path.parent / "another"
    folder.mkdir()
    torch.save(state, folder / path.name)
    content = (folder / path.name).read_bytes()
    shutil.rmtree(folder)
    assert len(content) == path.stat().st_size
    return content


def rewrite(path: Path, content: bytes | None = None) -> None:
    """In place, its time put back: as a sync tool does it."""
    content, seen = content or another(path), path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    now = path.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (seen.st_ino, seen.st_size, seen.st_mtime_ns)


def unchecked(made: Path, ranks: tuple[int, ...] = (0, 1)) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        edit(made, lambda shards: None, ranks)
    finally:
        torch.serialization.set_crc32_options(True)


class At(Silent):
    """Calls `act` when `stage` begins, or after so many blocks of the merge."""

    def __init__(self, act: Callable[[], None], stage: str, blocks: int = 0) -> None:
        self.act, self.when, self.blocks, self.now, self.done = act, stage, blocks, "", False

    def stage(self, name: str, total: int | None = None) -> None:
        self.now = name
        self.advance(0)

    def advance(self, nbytes: int) -> None:
        if self.now == self.when and not self.done:
            self.blocks -= nbytes > 0
            if self.blocks <= 0:
                self.done = True
                self.act()


def export(made: Path, out: Path, progress: Silent | None = None, runner: LocalRunner | None = None, **options):
    spec = checkpoint_spec(made, **{"dtype": "source", "verify": False, "memory_budget": BUDGET} | options)
    return export_to_directory(spec, out, runner or LocalRunner(1, 1), progress)


FULL = ["uneven", "inner", "grid", "hsdp", "moe", "fsdp1", "tied", "buffers", "bf16"]
CASES = [(name, "fused") for name in FULL] + [
    ("lora", "fused"), ("lora", "both"), ("lora", "adapter"), ("lora_fsdp1", "both"), ("lora_moe", "both"),
]  # fmt: skip


@pytest.mark.parametrize("when", [("merging", 0), ("merging", 1), ("merging", 7), ("comparing checksums", 0)])
@pytest.mark.parametrize(("name", "lora"), CASES)
def test_a_file_written_over_meanwhile(name, lora, when, made, tmp_path):
    """With its size and its time as before: refused, whichever file it is, and nothing is left."""
    paths = sorted((made / "actor").glob("*.pt"))
    path = paths[(when[1] + len(name)) % len(paths)]
    content = another(path)
    progress = At(lambda: rewrite(path, content), *when)
    base = str(made / "base") if "lora" in name else None
    with pytest.raises(SourceError, match=r"changed while being exported") as caught:
        export(made, tmp_path / "out", progress, lora=lora, base_model=base)
    assert progress.done
    assert path.name in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["uneven", "moe"])
def test_all_files_written_over_between_two_blocks(name, made, tmp_path, threads):
    contents = {path: another(path) for path in (made / "actor").glob("*.pt")}
    progress = At(lambda: [rewrite(*both) for both in contents.items()], "merging", 5)
    with pytest.raises(SourceError, match=r"rank_\d\.pt .*changed while being exported") as caught:
        export(made, tmp_path / "out", progress, LocalRunner(2, threads), max_shard_size="60KB")
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("name", ["even"])
def test_written_over_and_back_again(name, made, tmp_path):
    """At the end the file is as it was; what was read of it in between is not."""
    path = rank_file(made, 1)
    old, new = path.read_bytes(), another(path)
    away = At(lambda: rewrite(path, new), "merging", 2)
    back = At(lambda: rewrite(path, old), "comparing checksums")

    class Both(Silent):
        def stage(self, *args) -> None:
            away.stage(*args), back.stage(*args)

        def advance(self, nbytes: int) -> None:
            away.advance(nbytes), back.advance(nbytes)

    with pytest.raises(SourceError, match=r"rank_1\.pt \(rank 1\): .*CRC-32 [0-9a-f]{8} expected, [0-9a-f]{8} found"):
        export(made, tmp_path / "out", Both())
    assert away.done
    assert back.done
    export(made, tmp_path / "out")
    assert_same_model(tmp_path / "out", made / "reference")


@pytest.mark.parametrize("name", ["even"])
def test_written_over_while_the_server_copies(name, made, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SERVER_COPIES", {writer.file_system(tmp_path)})
    monkeypatch.setattr("verl_autoexport.merge.job._WORTH_A_COPY", 1)
    path = rank_file(made, 0)
    content = another(path)
    progress = At(lambda: rewrite(path, content), "merging", 1)
    with pytest.raises(SourceError, match="changed while being exported"):
        export(made, tmp_path / "out", progress)
    export(made, tmp_path / "copied")
    assert tensors(tmp_path / "copied").keys() == tensors(made / "reference").keys()


@pytest.mark.parametrize("name", ["tied"])
def test_tied_tensors_were_compared_as_they_were_saved(name, made):
    """What the plan reads counts too."""
    path = rank_file(made, 1)
    edit(made, lambda shards: shards.update({"lm_head.weight": _cloned(shards["lm_head.weight"])}))
    files, sums, told = FsdpFiles(made / "actor"), Sums(), []
    manifest, old = files.manifest(), path.read_bytes()
    rewrite(path)
    assert equal_values(manifest, "lm_head.weight", "model.embed_tokens.weight", sums)
    rewrite(path, old)
    with pytest.raises(SourceError, match=r"rank 1\): .*(lm_head|embed_tokens)\.weight"):
        files.verify_checksums(manifest, sums.runs(), told.append)
    files.verify_checksums(manifest, (), told.append)
    assert sum(told) > 0


def _cloned(tensor: DTensor) -> DTensor:
    return DTensor(tensor.to_local().clone(), tensor._spec, requires_grad=False)


# -- what lies beside them -------------------------------------------------------------------


def beside(made: Path, rank: int, steps: int, count: int = 2) -> Path:
    """As verl's FSDPCheckpointManager saves a rank's scheduler and random generators."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    path = made / f"actor/extra_state_world_size_{count}_rank_{rank}.pt"
    torch.save({"lr_scheduler": scheduler.state_dict(), "rng": rng}, path)
    return path


def test_schedulers_at_different_steps_are_of_different_saves(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    for rank in range(2):
        beside(made, rank, 300)
    assert not any("saves" in note for note in export(made, tmp_path / "out").notes)
    beside(made, 1, 301)
    with pytest.raises(SourceError, match=r"different saves: beside rank 0 .*300.*, beside rank 1 .*301.*extra_state"):
        export(made, tmp_path / "again")


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "no archive", "evil", "fifo", "no scheduler", "flipped"])
def test_a_scheduler_that_cannot_be_read_stops_no_export(kind, own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    beside(made, 0, 3)
    path = beside(made, 1, 3)
    content = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "evil":
        torch.save({"lr_scheduler": Evil(str(tmp_path / "ran"))}, path)
    elif kind == "no scheduler":
        torch.save({"lr_scheduler": None, "rng": {}}, path)
    elif kind == "flipped":
        path.write_bytes(content.replace(b"last_epoch", b"last\xffepoch"))
    elif kind != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "no archive": b"x" * 999}[kind])
    export(made, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_files_that_may_be_of_different_saves_are_noted(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    assert not any("saves" in note for note in export(made, tmp_path / "one").notes)
    now = rank_file(made, 0).stat().st_mtime
    os.utime(rank_file(made, 1), (now + 7200, now + 7200))
    (made / "data.pt").touch()
    (made.parent / "latest_checkpointed_iteration.txt").write_text("5")
    os.utime(made / "data.pt", (now, now))
    notes = " ".join(export(made, tmp_path / "two").notes)
    assert "the file of rank 1 was written 2:00:00 after that of rank 0: they may be of different saves" in notes
    assert "2:00:00 after data.pt" in notes
    assert "latest_checkpointed_iteration.txt says 5: the save of step 7 was not completed" in notes


# -- every byte ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hsdp", "fsdp1", "tied", "buffers"])
def test_every_record_of_every_file_is_looked_at(name, made, tmp_path):
    """Also replicas and what is not written."""
    for path in sorted((made / "actor").glob("*.pt")):
        whole = path.read_bytes()
        for record in (r for r in read_records(path) if r.nbytes > 64 and "/data/" in r.name):
            content = bytearray(whole)
            content[record.begin + record.nbytes // 2] ^= 1
            rewrite(path, bytes(content))
            with pytest.raises(SourceError, match=r"not those that training wrote") as caught:
                export(made, tmp_path / "out")
            assert f"{path} (rank {path.stem[-1]}): " in str(caught.value)
            assert f" ({record.name}): CRC-32 " in str(caught.value)
        rewrite(path, whole)
    export(made, tmp_path / "out")


def test_on_a_node(own_checkpoint):
    path, node, told = rank_file(own_checkpoint("even"), 1), NodeFiles(), []
    (seen,), records = node.marks([path]), read_records(path)
    for _ in range(2):  # Ray asks again where an answer was lost
        told.append(node.compare(path, 1, seen, records, ()))
    assert told == [sum(r.nbytes for r in records)] * 2
    rewrite(path)
    with pytest.raises(SourceError, match=r"rank 1\): .*changed while being exported"):
        node.compare(path, 1, seen, records, ())


def test_it_ends_when_nobody_waits(checkpoint):
    path, ended = rank_file(checkpoint("even"), 1), Event()
    wrong = [record._replace(crc=record.crc ^ 1) for record in read_records(path)]
    assert difference(path, wrong, ()) is not None
    ended.set()
    assert difference(path, wrong, (), lambda: not ended.is_set()) is None


def test_names_of_one_save_and_checksums_of_another(own_checkpoint, monkeypatch, tmp_path):
    """The file is another one just while its names and shapes are read."""
    made = own_checkpoint("even")
    path = made / "actor/model_world_size_2_rank_0.pt"
    times, first = path.stat(), path.read_bytes()
    state = torch.load(path, weights_only=False)
    a, b = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    state[a], state[b] = state[b], state[a]
    torch.save(state, tmp_path / "other.pt")
    second, read = (tmp_path / "other.pt").read_bytes(), fsdp_files.read_rank_file

    def put(content: bytes) -> None:
        with path.open("r+b") as file:
            file.write(content)
            file.truncate(len(content))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def swapped(file: Path, rank: int, *args: Any) -> Any:
        put(second) if rank == 0 else None
        try:
            return read(file, rank, *args)
        finally:
            put(first) if rank == 0 else None

    monkeypatch.setattr(fsdp_files, "read_rank_file", swapped)
    with pytest.raises(SourceError, match=r"rank_0\.pt \(rank 0\): the file changed while being exported"):
        export_checkpoint(made, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()

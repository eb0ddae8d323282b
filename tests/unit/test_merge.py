"""One planned file to bytes on disk: what is copied by others, what fails on the way, what stays in the page cache."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.page_cache import resident
from verl_autoexport.errors import MergeError
from verl_autoexport.merge import writer
from verl_autoexport.merge.job import MergeJob
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.merge.plan import Output, make_plan, whole
from verl_autoexport.merge.reader import within
from verl_autoexport.shards.manifest import Shard, ShardManifest, TensorEntry, check_coverage, join_runs
from verl_autoexport.shards.safetensors_files import model_files

ROWS, COLUMNS, BEFORE = 1536, 640, 100  # 3.9 MB of float32, each part behind some other bytes in its file


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def server(monkeypatch, tmp_path) -> None:
    """This file system is one whose copies are asked for."""
    monkeypatch.setattr(writer, "SERVER_COPIES", {writer.file_system(tmp_path)})


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The real `os.copy_file_range`, noting the bytes of every call that succeeded."""
    real, found = os.copy_file_range, []

    def copy(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(os, "copy_file_range", copy)
    return found


def manifest(values: torch.Tensor, folders: list[Path], dim: int = 0) -> ShardManifest:
    """`values` in as many parts as folders."""
    files, shards, start = [], [], 0
    for rank, (part, folder) in enumerate(zip(values.chunk(len(folders), dim), folders, strict=True)):
        files.append(folder / f"{rank}.bin")
        files[-1].write_bytes(os.urandom(BEFORE) + part.contiguous().numpy().tobytes())
        offsets = (start, 0) if dim == 0 else (0, start)
        shards.append(Shard(rank, offsets, tuple(part.shape), rank, BEFORE))
        start += part.shape[dim]
    entry = TensorEntry("w", str(values.dtype).removeprefix("torch."), tuple(values.shape), join_runs(shards))
    check_coverage(entry)
    return ShardManifest(tuple(files), {"w": entry}, len(folders), "fsdp2", "")


def merge(source: ShardManifest, path: Path, dtype: str = "float32", **how) -> torch.Tensor:
    shape = source.tensors["w"].shape
    plan = make_plan(source, [Output("w", shape, dtype, whole("w", shape))], 10**9)
    written = MergeJob(plan.files[0], source, path, 1 << 20, **how).run()
    content = path.read_bytes()
    assert (written.sha256, written.nbytes) == (hashlib.sha256(content).hexdigest(), len(content))
    (entry,) = model_files(path.parent).tensors.values()
    data = bytearray(content[entry.shards[0].byte_offset :])
    return torch.frombuffer(data, dtype=getattr(torch, dtype)).view(shape)


@given(st.data())
def test_cuts_of_a_run_are_what_a_box_has_of_its_shards(data):
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(3))

    dim, count, offsets, shape = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 5)), each(0, 3), each(1, 4)
    run, box = Shard(3, offsets, shape, 7, 0, count, dim, 2), (each(0, 8), each(1, 12))
    held, wanted, found = (torch.full((30, 30, 30), -1) for _ in range(3))
    for number in range(count):
        one = run.number(number)
        held[within(one.offsets, one.shape)] = torch.arange(one.file * 1000, one.file * 1000 + 64)[
            : torch.tensor(shape).prod()
        ].view(shape)
    wanted[within(*box)] = held[within(*box)]
    for cut in run.cuts(*box):
        assert cut.extent == (*cut.shape[:dim], cut.shape[dim] * cut.count, *cut.shape[dim + 1 :])
        parts = [
            held[within(run.number(cut.first + i).offsets, shape)][within(cut.local, cut.shape)]
            for i in range(cut.count)
        ]
        assert (found[within(cut.at, cut.extent)] == -1).all(), "none twice"
        found[within(cut.at, cut.extent)] = torch.cat(parts, dim)
    assert torch.equal(found, wanted)


def test_the_server_copies_what_needs_no_change(values, tmp_path, server, calls):
    source = manifest(values, [tmp_path] * 3)
    assert torch.equal(merge(source, tmp_path / "model.safetensors"), values)
    assert sum(calls) == values.nbytes


@pytest.mark.parametrize(("dim", "dtype"), [(0, "float32"), (1, "float32"), (0, "bfloat16"), (1, "float16")])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_a_file(values, tmp_path, dim, dtype, threads):
    """The file and its hash are the same; blocks are small, so that all have many turns."""
    source = manifest(values, [tmp_path] * 3, dim)
    found = merge(source, tmp_path / "model.safetensors", dtype, threads=threads)
    assert torch.equal(found, values.to(getattr(torch, dtype)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_error_is_told(values, tmp_path, threads):
    values[700, 5] = float("inf")
    with pytest.raises(MergeError, match="w: 0 NaN and 1 Inf values"):
        merge(manifest(values, [tmp_path] * 2, 1), tmp_path / "model.safetensors", threads=threads)


def test_progress_that_raises_ends_all_threads(values, tmp_path):
    source = manifest(values, [tmp_path] * 2)
    plan = make_plan(source, [Output("w", (ROWS, COLUMNS), "bfloat16", whole("w", (ROWS, COLUMNS)))], 10**9)
    seen: list[int] = []

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 3:
            raise KeyboardInterrupt

    job = MergeJob(plan.files[0], source, tmp_path / "out", 1 << 20, threads=4)
    with pytest.raises(KeyboardInterrupt):
        job.run(progress)
    assert len(seen) <= 3 + 3, "each of the others may have been in the middle of one block"


def test_more_ranks_than_files_may_be_open(values, tmp_path):
    source = manifest(values, [tmp_path] * 640, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        assert torch.equal(merge(source, tmp_path / "model.safetensors"), values)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_on_a_disk_of_this_machine_reading_and_writing_is_faster(values, tmp_path, calls):
    assert writer.file_system(tmp_path / "not/yet/there") not in ("", *writer.SERVER_COPIES)
    assert torch.equal(merge(manifest(values, [tmp_path] * 3), tmp_path / "model.safetensors"), values)
    assert calls == []


def test_more_ranks_than_files_may_be_open_are_copied(values, tmp_path, server, calls):
    """A row each, so that one block is of more files than are kept open."""
    source = manifest(values[:640], [tmp_path] * 640)
    assert torch.equal(merge(source, tmp_path / "model.safetensors"), values[:640])
    assert sum(calls) == values[:640].nbytes


@pytest.mark.parametrize(("dim", "dtype"), [(1, "float32"), (0, "bfloat16")])
def test_what_is_cut_or_cast_is_not_copied(values, tmp_path, server, calls, dim, dtype):
    source = manifest(values, [tmp_path] * 3, dim)
    assert torch.equal(merge(source, tmp_path / "model.safetensors", dtype), values.to(getattr(torch, dtype)))
    assert calls == []


def test_a_part_that_cannot_be_copied_is_read(values, tmp_path, server, monkeypatch):
    """The second of two parts lies where the kernel does not copy from: the first one is written over."""
    source, real = manifest(values, [tmp_path] * 2), os.copy_file_range
    second = source.files[1].stat().st_ino

    def copy(from_, to, *args):
        if os.fstat(from_).st_ino == second:
            return real(from_, os.pipe()[1], *args)  # EINVAL, from the kernel itself
        return real(from_, to, *args)

    monkeypatch.setattr(os, "copy_file_range", copy)
    assert torch.equal(merge(source, tmp_path / "model.safetensors"), values)


def test_across_file_systems(values, tmp_path, server):
    folder = Path("/dev/shm") / f"merge-{os.getpid()}"
    folder.mkdir()
    try:
        assert torch.equal(merge(manifest(values, [folder, tmp_path]), tmp_path / "model.safetensors"), values)
    finally:
        shutil.rmtree(folder)


def test_nan_among_copied_bytes_is_refused(values, tmp_path, server, calls):
    values[700, 5] = float("nan")
    with pytest.raises(MergeError, match="w: 1 NaN and 0 Inf values"):
        merge(manifest(values, [tmp_path] * 2), tmp_path / "model.safetensors")
    assert calls


def test_a_source_cut_short_while_it_is_copied(values, tmp_path, server):
    source = manifest(values, [tmp_path] * 2)
    os.truncate(source.files[1], BEFORE + 10)
    with pytest.raises(MergeError, match=r"its source ends \d+ bytes too early"):
        merge(source, tmp_path / "model.safetensors")


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("read_again", [True, False])
def test_the_page_cache_keeps_what_is_read_again(values, tmp_path, monkeypatch, cached, read_again):
    monkeypatch.setattr(writer, "_BEHIND", 1 << 18)  # so that most is sent to the disk before the end
    source = manifest(values, [tmp_path] * 2)
    for path in source.files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # as verl's are by the time that they are exported
    out = tmp_path / "model.safetensors"
    shape = source.tensors["w"].shape
    plan = make_plan(source, [Output("w", shape, "bfloat16", whole("w", shape))], 10**9)
    MergeJob(plan.files[0], source, out, 1 << 20, cached, read_again).run()
    held = {True: lambda path: resident(path) > 0.9, False: lambda path: resident(path) < 0.1}
    assert held[read_again](out)
    assert all(map(held[cached], source.files))
    content = out.read_bytes()[-2 * values.numel() :]
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(shape), values.bfloat16())


def test_a_file_that_fails_ends_the_others(values, tmp_path):
    """Of several files merged at once the error of the one that failed is told."""
    bad = values.clone()
    bad[0, 0] = float("inf")
    jobs = []
    for name, held in {"a": values, "b": bad, "c": values}.items():
        (tmp_path / name).mkdir()
        source = manifest(held, [tmp_path / name])
        plan = make_plan(source, [Output("w", (ROWS, COLUMNS), "bfloat16", whole("w", (ROWS, COLUMNS)))], 10**9)
        jobs.append(MergeJob(plan.files[0], source, tmp_path / name / "out", 1 << 20))
    with pytest.raises(MergeError, match="w: 0 NaN and 1 Inf values"):
        LocalRunner(2).run(jobs, lambda nbytes: None)

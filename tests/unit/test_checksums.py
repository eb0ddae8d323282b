"""Checksums of parts, combined in any order, and the directories of archives that they are compared with."""

from __future__ import annotations

import os
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_autoexport.errors import SourceError
from verl_autoexport.shards.archive_records import Record, difference, mark, read_records
from verl_autoexport.shards.checksums import Run, Sums, combine, join

# -- arithmetic ------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combined_as_if_read_at_once(a, b):
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_combined_over_gigabytes():
    """zlib itself goes over as many zeros."""
    block, crc = bytes(1 << 26), 0
    for _ in range(8):
        crc = zlib.crc32(block, crc)
    assert combine(zlib.crc32(b""), crc, 8 << 26) == crc
    assert combine(zlib.crc32(block), combine(0, crc, 8 << 26), 8 << 26) == zlib.crc32(block, crc)


PARTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 59), st.integers(1, 40)), max_size=30)


@given(PARTS, st.randoms())
def test_whatever_is_read_in_whatever_order(tmp_path_factory, parts, chance):
    """Gaps, overlaps and repetitions: sound files are found sound, and one wrong byte in any reading is found."""
    folder, content = tmp_path_factory.mktemp("parts"), bytes(chance.randrange(256) for _ in range(100))
    records = [Record("a", 10, 50, zlib.crc32(content[10:60])), Record("b", 61, 39, zlib.crc32(content[61:]))]
    parts = [
        (f, b, min(b + n, r.begin + r.nbytes))
        for f, b, n in parts
        for r in records
        if r.begin <= b < r.begin + r.nbytes
    ]
    path, sums = folder / "file", Sums()
    path.write_bytes(content)
    for file, begin, end in parts:
        sums.add(file, begin, memoryview(content)[begin:end])
    runs = sums.runs()
    assert all(run.crc == zlib.crc32(content[run.begin : run.end]) for run in runs)
    assert {(f, i) for f, b, e in parts for i in range(b, e)} == {(f, i) for f, b, e, _ in runs for i in range(b, e)}
    assert difference(path, records, [run for run in runs if run.file == 0]) is None
    own = [part for part in parts if part[0] == 0]
    if own:
        _, begin, end = chance.choice(own)
        wrong = bytearray(content[begin:end])
        wrong[chance.randrange(end - begin)] ^= 1 << chance.randrange(8)
        sums.add(0, begin, memoryview(wrong))
        assert difference(path, records, [run for run in join(set(sums.runs())) if run.file == 0]) is not None


def test_what_is_read_elsewhere_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    records = [Record("a", 10, 20, zlib.crc32(bytes(20)))]
    assert difference(path, records, []) is None
    for begin, end in ((0, 5), (5, 15), (25, 35), (40, 50)):
        with pytest.raises(SourceError, match="not in its directory"):
            difference(path, records, [Run(0, begin, end, zlib.crc32(bytes(end - begin)))])


# -- the directory of a file -----------------------------------------------------------------


def test_records_of_a_file_beyond_four_gigabytes(tmp_path):
    """Sparse, as the directory of such a file points beyond what 32 bits hold."""
    path, large = tmp_path / "large.pt", (4 << 30) + 100
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        archive.writestr("x/data/0", b"first")
    with path.open("r+b") as file, zipfile.ZipFile(file, "a", allowZip64=True) as archive:
        archive.start_dir = large
        file.truncate(large)
        archive.writestr("x/data/1", b"second")
        archive.filelist[0].file_size = large  # as one of more than 4 GB would be listed
        archive._didModify = True
    found = read_records(path)
    assert [(r.name, r.nbytes, r.crc) for r in found] == [
        ("x/data/0", large, zlib.crc32(b"first")), ("x/data/1", 6, zlib.crc32(b"second")),
    ]  # fmt: skip
    assert found[1].begin > 4 << 30


@pytest.mark.parametrize(
    "content", [b"", b"PK\x05\x06", b"PK\x05\x06" + b"\xff" * 18, b"x" * 100_000, b"PK\x01\x02" * 99]
)
def test_files_without_a_directory_are_told_by_size_and_time(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    before = mark(path)
    assert not before.checked
    assert read_records(path) == ()
    os.utime(path, ns=(1, 1))
    assert mark(path) != before


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="fifo"):
        mark(tmp_path / "fifo")

"""Rank files' pickles are read as data: those of every torch alike; what is no tensor or no archive is refused."""

from __future__ import annotations

import os
import resource
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.repository import DATA
from tests.support.torch_archives import NAME, archive
from verl_autoexport.errors import SourceError
from verl_autoexport.merge.reader import ShardReader
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles, read_rank_file
from verl_autoexport.sources.fsdp.rank_pickle import Call, Name, Refused, Stored, unpickle
from verl_autoexport.sources.fsdp.rank_state import Strided, read_mesh, read_tensor
from verl_autoexport.sources.fsdp.second_reading import read_again

# -- what torch writes ------------------------------------------------------------------------


VERSIONS = ["2.4.1", "2.6.0", "2.8.0", "2.11.0", "2.13.0"]


@pytest.mark.parametrize("version", [*VERSIONS, "2.8.0-grid", "2.10.0-grid"])
def test_what_any_torch_wrote_is_read_and_compared(version):
    """FSDP2 of two ranks, a matrix and a vector of five rows: uneven. `grid`: a mesh of 2 x 2, and it flattened."""
    folder = DATA / f"torch-{version}"
    full = torch.load(folder / "full.pt", weights_only=True)
    manifest = FsdpFiles(folder).manifest()
    with ShardReader(manifest) as reader:
        found = {name: reader.whole(name) for name in manifest.tensors}
    assert found.keys() == full.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in full.items())
    again = read_again(folder)
    assert again.tensors.keys() == full.keys()
    for name, visit in again.tensors.items():
        target = torch.full_like(full[name], float("nan"))
        visit(target, lambda place, values: place.copy_(values))
        assert torch.equal(target, full[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_renamed_file_of_any_torch(version, tmp_path):
    folder = DATA / f"torch-{version}"
    with pytest.raises(SourceError, match=r"0\.weight in .* \(rank 0\): it was written by rank 1, so the file has"):
        read_rank_file(folder / "model_world_size_2_rank_1.pt", 0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_can_write(protocol, tmp_path):
    values = {
        "float": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0, 4),
        "long": torch.tensor(7), "bool": torch.tensor([True, False]), "part": torch.arange(10)[4:8], "ü": torch.ones(1),
        "eight": torch.ones(4).to(torch.float8_e4m3fn), "unsigned": torch.ones(2, dtype=torch.uint16),
        "parameter": torch.nn.Parameter(torch.ones(2)), "frozen": torch.nn.Parameter(torch.ones(2), False),
        "x" * 300: torch.ones(1),
    }  # fmt: skip
    values["tied"] = values["float"]
    torch.save(values, tmp_path / NAME, pickle_protocol=protocol)
    manifest = FsdpFiles(tmp_path).manifest()
    with ShardReader(manifest) as reader:
        for name, tensor in values.items():
            assert torch.equal(reader.whole(name).float(), tensor.float()), name
    assert manifest.tensors["tied"].shards[0].byte_offset == manifest.tensors["float"].shards[0].byte_offset


# -- records that are no tensors --------------------------------------------------------------


def torchs(leaf: str, *args: Any, state: Any = None) -> Call:
    return Call(Name("torch._utils", leaf), args, state)


FLOATS = Stored("FloatStorage", "0", 6)
FLOAT32 = Name("torch", "float32")


def plain(*size: int, storage: Any = FLOATS, offset: Any = 0, stride: Any = None, more: tuple[Any, ...] = ()) -> Call:
    stride = torch.empty(size, device="meta").stride() if stride is None else stride
    return torchs("_rebuild_tensor_v2", storage, offset, size, stride, False, {}, *more)


def sharded(**changes: Any) -> Call:
    meta = Call(Name("m", "TensorMeta"), ((4, 3), (3, 1), FLOAT32))
    placement = Call(Name("m", "Shard"), (), {"dim": 0})
    spec = {"mesh": Call(Name("m", "DeviceMesh"), ()), "placements": (placement,), "tensor_meta": meta}
    state = {"_local_tensor": plain(2, 3), "_spec": Call(Name("m", "DTensorSpec"), (), spec)}
    size = changes.pop("size", (4, 3))
    (spec if changes.keys() <= spec.keys() | {"shard_order"} else state).update(changes)
    kind = Name("torch.distributed.tensor", "DTensor")
    args = (kind, FLOAT32, size, (3, 1), 0, None, None, False)
    return torchs("_rebuild_from_type_v2", Name("torch._utils", "_rebuild_wrapper_subclass"), kind, args, state)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (7, "it is a int"), (None, "it is a None"), ({}, "it is a dict"), (Name("torch", "float32"), "torch.float32"),
        (plain(2, 3, more=({"neg": True},)), "sign or conjugate bit"), (plain(2, 3, stride=(3,)), "2 sizes and 1 str"),
        (plain(2, 3, offset=-1), "offset"), (plain(2, 3, storage=7), "storage"), (plain(2, 3, offset=True), "offset"),
        (torchs("_rebuild_tensor_v2", FLOATS, 0, (2, -3), (3, 1), False, {}), "whole numbers"),
        (torchs("_rebuild_tensor_v2", FLOATS, 0, (1 << 70,), (1,), False, {}), "whole numbers"),
        (torchs("_rebuild_tensor_v2", FLOATS, 0, [2, 3], (3, 1), False, {}), "sizes are a list"),
        (torchs("_rebuild_parameter", torchs("_rebuild_parameter", plain(2), False, {}), False, {}), "_rebuild_param"),
        (torchs("_rebuild_tensor_v3", FLOATS, 0, (2,), (1,), False, {}, "float32"), "its dtype is a str"),
        (torchs("_rebuild_from_type_v2", Name("a", "_rebuild_tensor_v2"), Name("a", "Other"), (), {}), "a.Other"),
        (sharded(_local_tensor=sharded()), "expected a plain tensor"), (sharded(_spec=None), "without a spec"),
        (sharded(mesh=None), "without a device mesh"), (sharded(size=(5, 3)), "described as float32 [5, 3]"),
        (sharded(_local_tensor=plain(2, 3, storage=Stored("HalfStorage", "0", 6))), "it is float16 here"),
        (sharded(shard_order=(Call(Name("m", "ShardOrderEntry"), (0, (1, 0))),)), "in the order [1, 0]"),
    ],
)  # fmt: skip
def test_records_that_are_no_tensors(record, words):
    with pytest.raises(Refused) as caught:
        read_tensor(record)
    assert words in str(caught.value)


def test_records_of_tensors():
    assert read_tensor(torchs("_rebuild_parameter", plain(2, 3), True, {})).shape == (2, 3)
    assert read_tensor(sharded(shard_order=(Call(Name("m", "ShardOrderEntry"), (0, (0, 1))),))).placements == (0,)
    odd = (Call(Name("m", "_StridedShard"), (), {"dim": 0, "split_factor": 2}), Call(Name("m", "Replicate"), (), {}))
    assert read_tensor(sharded(placements=odd)).placements == ("_S(0, 2)", None)


def layout(*axes: tuple[Any, Any], newer: bool = False) -> Call:
    """As torch 2.10 and 2.11 have it, or `newer`."""
    flat = [{"shape": shape, "stride": stride} for shape, stride in axes]
    if newer:
        return Call(Name("m", "_MeshLayout"), (), {"axes": tuple(Call(Name("m", "_FlatLayout"), (), a) for a in flat)})
    both = {key: tuple(a[key] if len(a[key]) > 1 else a[key][0] for a in flat) for key in ("shape", "stride")}
    return Call(Name("m", "_MeshLayout"), (), both)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("axes", "rank", "shape", "ranks"),
    [
        ([((8,), (1,))], 3, (8,), range(8)),
        ([((2,), (4,)), ((4,), (1,))], 3, (2, 4), range(8)),
        ([((4,), (1,))], 3, (4,), range(4)),
        ([((4,), (1,))], 6, (4,), range(4, 8)),
        ([((2,), (4,))], 6, (2,), (2, 6)),
        ([((2,), (4,)), ((2,), (1,))], 6, (2, 2), (2, 3, 6, 7)),
        ([((2, 2), (4, 1))], 6, (4,), (2, 3, 6, 7)),
    ],
)
def test_the_ranks_of_a_mesh_are_those_of_torch(axes, rank, shape, ranks, newer):
    state = {"_layout": layout(*axes, newer=newer), "_rank_map": plain(8), "_rank": rank}
    mesh = read_mesh(Call(Name("m", "DeviceMesh"), (), state), lambda *_: range(8), rank)
    assert (mesh.shape, mesh.ranks, mesh.writers) == (shape, tuple(ranks), (rank,))
    from torch.distributed import _mesh_layout

    if not hasattr(_mesh_layout, "_FlatLayout"):
        return
    theirs = _mesh_layout._MeshLayout([_mesh_layout._FlatLayout(*axis) for axis in axes])
    every = theirs.remap_to_tensor(torch.arange(8))
    assert mesh.ranks in [tuple(m.flatten().tolist()) for m in every]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "unknown kind"), ({"_rank_map": plain(8)}, "sizes are not"),
        ({"_rank_map": plain(8), "_layout": layout()}, r"a device mesh of \[\]"),
        ({"_rank_map": plain(8), "_layout": layout(((16,), (1,)))}, r"of \[16\] in one of 8"),
        ({"_rank_map": plain(8), "_layout": layout(((1 << 60,), (1,)))}, "in one of 8"),
        ({"_rank_map": plain(8), "_layout": layout(((4,), (1 << 60,)))}, "not laid out"),
        ({"_rank_map": plain(8), "_layout": layout(((4,), (0,)))}, "not laid out"),
        ({"mesh": plain(8), "_coordinate_on_dim": [8]}, "coordinates"),
        ({"mesh": plain(8), "_coordinate_on_dim": [1, 1]}, "coordinates"), ({"mesh": 7}, "it is a int"),
    ],
)  # fmt: skip
def test_meshes_that_cannot_be(state, words):
    with pytest.raises(Refused, match=words):
        read_mesh(Call(Name("m", "DeviceMesh"), (), state), lambda *_: range(8), 0)


def test_a_mesh_that_is_a_column_of_another(tmp_path):
    """torch up to 2.9 stores a view of the whole."""
    columns = torch.arange(8, dtype=torch.int32).view(4, 2)
    torch.save({"mesh": columns[:, 1]}, tmp_path / NAME)
    with zipfile.ZipFile(tmp_path / NAME) as made:
        held = unpickle(made.read(next(n for n in made.namelist() if n.endswith("data.pkl"))))
    from verl_autoexport.sources.fsdp.rank_files import RankFile

    tensor = read_tensor(held["mesh"])
    assert isinstance(tensor, Strided)
    assert RankFile(tmp_path / NAME, 0).integers("mesh", tensor) == [1, 3, 5, 7]


# -- the archive ------------------------------------------------------------------------------


def rebuilt(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    with zipfile.ZipFile(path) as made:
        records = {r.filename.partition("/")[2]: made.read(r) for r in made.infolist()}
    change(records)
    archive(path, records.pop("data.pkl"), **records)


def flip(path: Path, at: bytes, by: int = 0, last: bool = True) -> None:
    """Change one byte, found by what stands before it."""
    content = bytearray(path.read_bytes())
    content[(content.rindex(at) if last else content.index(at)) + len(at) + by] ^= 1
    path.write_bytes(content)


def double(path: Path, record: str) -> None:
    with zipfile.ZipFile(path, "a") as made, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's, of the name that is there twice
        made.writestr(record, b"x")


ARCHIVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "big-endian": (lambda p: rebuilt(p, lambda r: r.update(byteorder=b"big")), "its byteorder is b'big'"),
    "of another format": (lambda p: rebuilt(p, lambda r: r.update({".format_version": b"2"})), "its .format_version"),
    "storage twice": (lambda p: double(p, f"{p.stem}/data/0"), "data/0' is in it more than once"),
    "storage twice in another case": (lambda p: double(p, f"{p.stem}/DATA/0"), "is in it more than once"),
    "pickle that was changed": (lambda p: flip(p, b"_local_tensor", 2, last=False), "names and shapes are not those"),
    "storage that is longer": (lambda p: rebuilt(p, lambda r: r.update({"data/0": bytes(96)})), "should have 84"),
    "storage that is shorter": (lambda p: rebuilt(p, lambda r: r.update({"data/0": bytes(80)})), "and has 80"),
    "storage that is not there": (lambda p: rebuilt(p, lambda r: r.pop("data/0")), "and is not there"),
    "in front": (lambda p: p.write_bytes(b"MZ" + p.read_bytes()), "not a whole torch file"),
    "a directory that lies of a size": (lambda p: flip(p, b"PK\1\2", 20), "would unpack to"),
    "a directory that lies of a place": (lambda p: flip(p, b"PK\1\2", 38), "truncated or damaged"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "the file is empty"),
    "a device": (lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "the file is empty"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "not a whole torch file"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_torch_does_not_write(case, tmp_path):
    path = Path(shutil.copy(DATA / "torch-2.13.0/model_world_size_2_rank_1.pt", tmp_path))
    change, words = ARCHIVES[case]
    change(path)
    with pytest.raises(SourceError) as caught:
        read_rank_file(path, 1)
    assert words in str(caught.value)
    assert f"{path} (rank 1" in str(caught.value)


def test_records_that_overlap(tmp_path):
    """The second entry of the directory leads to the first one's bytes."""
    path = Path(shutil.copy(DATA / "torch-2.13.0/model_world_size_2_rank_1.pt", tmp_path))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as made:
        entries = {r.filename.rpartition("/")[2]: r for r in made.infolist()}
    at = content.rindex(b"/data/2") - content[: content.rindex(b"/data/2")].rindex(b"PK\1\2")
    begin = content.rindex(b"/data/2") - at
    content[begin + 42 : begin + 46] = entries["0"].header_offset.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(SourceError, match="overlap or go beyond its end"):
        read_rank_file(path, 1)


def test_an_archive_of_very_many_records(tmp_path):
    """Names in any number cost what they take on disk."""
    records = {f"data/{i}": b"" for i in range(20_000)}
    path = archive(tmp_path / NAME, b"\x80\x02}.", **records)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_rank_file(path, 0) == {}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 40 * path.stat().st_size

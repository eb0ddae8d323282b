"""Hostile pickles in rank files are refused at once, in little memory, and torch never loads them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch

from tests.support.checkpoints import NORM, edit, rank_file
from tests.support.torch_archives import NAME, archive
from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles
from verl_autoexport.sources.fsdp.rank_pickle import Refused
from verl_autoexport.sources.fsdp.second_reading import read_again


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, leaf: str) -> bytes:
    return f"c{module}\n{leaf}\n".encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def pickled(value: bytes) -> bytes:
    """A state dict in which `w` is `value`."""
    return b"\x80\x02}" + text("w") + value + b"s."


def colliding() -> bytes:
    """A hundred thousand keys of one hash."""
    modulus = (1 << 61) - 1
    longs = (b"\x8a\x0c" + (modulus * i).to_bytes(12, "little") + b"N" for i in range(1, 100_001))
    return b"}(" + b"".join(longs) + b"u"


DOUBLING = b")\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))
MESH = name("torch.distributed.device_mesh", "DeviceMesh")
HOSTILE = {
    "bytearray": (pickled(name("__builtin__", "bytearray") + integer(1 << 30) + b"\x85R"), "__builtin__.bytearray"),
    "tensor": (pickled(name("torch", "Tensor") + integer(2 * 10**8) + b"\x85R"), "calls torch.Tensor in a way"),
    "set": (pickled(name("__builtin__", "set") + name("torch", "Tensor") + b"\x85R"), "__builtin__.set"),
    "counter": (pickled(name("collections", "Counter") + b")R"), "collections.Counter"),
    "ordered": (pickled(name("collections", "OrderedDict") + name("torch", "Tensor") + b"\x85R"), "in a way that"),
    "size": (pickled(name("torch", "Size") + name("torch", "Tensor") + b"\x85\x85R"), "it is a torch.Size"),
    "class": (pickled(name("torch", "Tensor") + b")\x81"), "it is a torch.Tensor"),
    "rendezvous": (pickled(MESH + text("cpu") + b"]K\x00a\x86R"), "DeviceMesh in a way"),
    "process group": (pickled(name("torch.distributed", "init_process_group") + b")R"), "init_process_group"),
    "attribute": (pickled(name("torch.serialization", "load") + b")R"), "torch.serialization.load"),
    "eval": (b"\x80\x04}\x8c\x01w\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85Rs.", "builtins.eval"),
    "old": (pickled(name("torch.distributed._shard.sharded_tensor.api", "ShardedTensor") + b")\x81"), "device mesh"),
    "tuple key": (b"\x80\x02}" + DOUBLING + b"Ns.", "a key is a tuple"),
    "tuple value": (pickled(DOUBLING), "it is a tuple"),
    "long keys": (pickled(colliding()), "a key is a int"),
    "deep": (pickled(b")" + b"\x85" * 1_000_000), "more containers"),
    "lists": (b"\x80\x02" + b"]" * 3_000_000 + b".", "more containers"),
    "marks": (b"\x80\x02" + b"(" * 1_000_000 + b".", "nested too deeply"),
    "values": (b"\x80\x02" + b"N" * 3_000_000 + b".", "too many values"),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "under number 2147483647"),
    "memo that is not there": (b"\x80\x02}j\xff\xff\xff\x7f.", "cut short or damaged"),
    "long text": (b"\x80\x02}X\xff\xff\xff\x7fw.", "cut short or damaged"),
    "long bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00.", "opcode"),
    "long integer": (pickled(b"\x8b\xff\xff\xff\x7f1"), "opcode"),
    "integer": (pickled(b"\x8a\xff" + b"1" * 255), "an integer of 255 bytes"),
    "global without end": (pickled(b"c" + b"x" * 1_000_000), "without an end"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "opcode"),
    "extension": (b"\x80\x02\x82\x01.", "opcode"),
    "text opcode": (b"\x80\x02I1\n.", "opcode"),
    "protocol": (b"\x80\x01}.", "its protocol is 1"),
    "twice": (b"\x80\x02}(" + (text("w") + b"N") * 2 + b"u.", "has a key twice"),
    "itself": (b"\x80\x02}q\x00" + text("w") + b"h\x00s.", "it is a dict"),
    "no storage": (pickled(text("0") + b"Q"), "something other than a storage"),
    "no state": (pickled(b"]}b"), "a list a state"),
    "a list": (b"\x80\x02].", "expected a dict of tensors, found list"),
    "nothing": (b"", "cut short or damaged"),
    "no end": (b"\x80\x02}", "cut short or damaged"),
    "an end too early": (b"\x80\x02}(.", "ends in the middle"),
}  # fmt: skip
CHILD = """
import json, resource, sys
from pathlib import Path
from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp.rank_files import read_rank_file
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20),) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        said = f"read: {len(read_rank_file(path, 0))}"
    except SourceError as e:
        said = str(e)
    print(json.dumps([path.parent.name, said]), flush=True)
"""


def test_hostile_pickles_are_refused_at_once_in_little_memory(tmp_path):
    """All of them by one process that may take 300 MB more; the slow ones would never end."""
    paths = [archive(tmp_path / case / NAME, content) for case, (content, _) in HOSTILE.items()]
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(map(json.loads, done.stdout.splitlines()))
    for case, (_, words) in HOSTILE.items():
        assert words in found[case], f"{case}: {found[case]}"
        assert str(tmp_path / case / NAME) in found[case]
        assert "(rank 0" in found[case]
        assert found[case].isprintable()
        assert len(found[case]) < 1000


def test_the_key_is_named_at_which_a_pickle_is_refused(own_checkpoint):
    class Evil:
        def __reduce__(self):
            return os.getcwd, ()

    made = edit(own_checkpoint("even"), lambda shards: shards.update({NORM: Evil()}), ranks=(1,))
    with pytest.raises(SourceError, match=rf"^{NORM} in .*\(rank 1, .*: it names posix.getcwd, which is no part"):
        FsdpFiles(made / "actor").manifest()


def test_the_second_reading_never_lets_torch_load_what_is_refused(own_checkpoint, monkeypatch):
    made = own_checkpoint("even")
    archive(rank_file(made, 0), HOSTILE["rendezvous"][0])
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: loaded.append(args))
    with pytest.raises(Refused, match="DeviceMesh in a way"):
        read_again(made / "actor")
    assert loaded == []

"""Compare every version of a run with verl's own checkpoint of its step, bit for bit, in the environment of the run.

usage: compare.py CHECKPOINTS     (the directory with global_step_N and exports)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed.tensor
from safetensors.torch import load_file


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors in the rank files of `folder`, as torch itself loads them."""
    files = sorted(folder.glob("model_world_size_*.pt"), key=lambda p: int(p.stem.rpartition("_")[2]))
    assert files, f"{folder}: no rank files"
    ranks = [torch.load(file, weights_only=False, map_location="cpu") for file in files]
    local = [{k: v.to_local() if hasattr(v, "to_local") else v for k, v in rank.items()} for rank in ranks]
    return {name: torch.cat([rank[name] for rank in local]) for name in local[0]}


def main(checkpoints: Path) -> None:
    versions = sorted((checkpoints / "exports").glob("v*-step*"))
    assert versions, f"{checkpoints}: no versions"
    for version in versions:
        record = json.loads((version / "export.json").read_text())
        step = checkpoints / f"global_step_{record['step']}"
        expected = trained(step / "actor" if (step / "actor").is_dir() else step)
        found: dict[str, torch.Tensor] = {}
        for file in version.glob("*.safetensors"):
            found |= load_file(file)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(torch.bfloat16)), f"{version}: {name}"
        checks = {name: check["status"] for name, check in record["verification"].items()}
        print(version.name, record["source"]["kind"], record["source"]["backend"], len(found), "equal", checks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

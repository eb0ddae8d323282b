"""A model with code of its own, and what verl's checkpoint manager and a live run save of it. Real FSDP, one rank.

`python -m tests.support.custom_code BASE OUT fsdp|fsdp2` saves twice: the first save changes
the configuration in memory. `OUT/global_step_2` is the second checkpoint, `OUT/live` the live run's.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

BLOCKS = "import torch\nfrom .scale_own import SCALE\n\n\nclass Twice(torch.nn.Module):\n    scale = SCALE\n"
MODELING = """import torch
from transformers import Qwen2ForCausalLM

from .blocks_own import Twice
from .configuration_own import OwnConfig


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.twice = Twice()
"""
CONFIGURATION = "from transformers import Qwen2Config\n\n\nclass OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
FILES = {
    "modeling_own.py": MODELING, "configuration_own.py": CONFIGURATION, "blocks_own.py": BLOCKS,
    "scale_own.py": "SCALE = 1.0\n", "unrelated.py": "raise RuntimeError('never imported')\n",
}  # fmt: skip
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def add_code(base: Path) -> Path:
    """Make the Qwen2 in `base` a model with its own code."""
    for name, text in FILES.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (base / "config.json").write_text(json.dumps(config))
    return base


def main(base: Path, out: Path, strategy: str) -> None:
    import torch
    import torch.distributed as dist
    from omegaconf import OmegaConf
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    from verl_autoexport.export.assets import model_files

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    if strategy == "fsdp":
        model = FullyShardedDataParallel(model, device_mesh=mesh, use_orig_params=False, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=mesh)
    contents = OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]})
    tokenizer = AutoTokenizer.from_pretrained(base)
    manager = FSDPCheckpointManager(model, None, None, tokenizer, contents, True)
    own = getattr(model, "_fsdp_wrapped_module", model)
    for name, content in model_files(own, tokenizer).items():
        path = out / "live" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert own.config.auto_map == AUTO_MAP, "the running model is not ours to change"
    for step in (1, 2):
        manager.save_checkpoint(str(out / f"global_step_{step}/actor"), global_step=step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Places in torch that refuse what verl asks for once there is no accelerator."""

from __future__ import annotations

import functools

import torch.distributed as dist
import torch.distributed.fsdp as fsdp
import torch.distributed.fsdp._init_utils as fsdp_init


def apply() -> None:
    """Patch this process; once, at import."""
    dist.init_process_group = _one_gloo(dist.init_process_group)
    # FSDP1 refuses sync_module_states for modules on the CPU, though gloo can broadcast them.
    fsdp_init._check_module_states_for_sync_module_states = lambda module_states: None
    fsdp.CPUOffloadPolicy = _UnpinnedOffload


def _one_gloo(init_process_group):
    """verl asks for one backend per device type, which on the CPU names the same type twice."""

    @functools.wraps(init_process_group)
    def wrapper(backend=None, *args, **kwargs):
        if backend == "cpu:gloo,cpu:gloo":
            backend = "cpu:gloo"
        return init_process_group(backend, *args, **kwargs)

    return wrapper


class _UnpinnedOffload(fsdp.CPUOffloadPolicy):
    """FSDP2 offload without pinned memory, which only an accelerator can allocate."""

    def __init__(self, pin_memory: bool = False):
        super().__init__(pin_memory=False)

"""The places in torch, transformers and older verls that refuse to train without an accelerator. Test support only."""

import functools

_NOTHING = ("empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats", "set_device", "ipc_collect")
_NO_MEMORY = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")


class _Device(str):
    """The current device, which verl puts into names such as `cpu:0`, or passes on."""

    def __format__(self, spec):
        return "0"


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    wait = synchronize = record

    def query(self):
        return True


def patch_torch():
    import torch
    import torch.distributed as dist
    import torch.distributed.fsdp as fsdp
    from torch.distributed.fsdp import _init_utils

    for name in _NOTHING:
        setattr(torch.cpu, name, lambda *args, **kwargs: None)
    for name in _NO_MEMORY:
        setattr(torch.cpu, name, lambda *args, **kwargs: 0)
    torch.cpu.mem_get_info = lambda *args, **kwargs: (1, 1)
    torch.cpu.get_rng_state, torch.cpu.set_rng_state = torch.get_rng_state, torch.set_rng_state
    torch.cpu.get_device_name = lambda *args, **kwargs: "CPU"
    torch.cpu.current_device = lambda: _Device("cpu")
    if not hasattr(torch.cpu, "Event"):
        torch.cpu.Event = _Event
    for name in ("wait_event", "wait_stream", "synchronize"):
        if not hasattr(torch.cpu.Stream, name):
            setattr(torch.cpu.Stream, name, lambda *args, **kwargs: None)
    if not hasattr(torch.cpu.Stream, "record_event"):
        torch.cpu.Stream.record_event = lambda self, event=None: event or _Event()
    dist.init_process_group = _on_gloo(dist.init_process_group)
    _average(dist)
    # FSDP1 refuses sync_module_states for modules on the CPU, though gloo can broadcast them.
    _init_utils._check_module_states_for_sync_module_states = lambda states: None
    if hasattr(fsdp, "CPUOffloadPolicy"):
        fsdp.CPUOffloadPolicy = functools.partial(fsdp.CPUOffloadPolicy, pin_memory=False)
    _without_flash_attention()
    _without_pinned_memory()


def _on_gloo(init):
    @functools.wraps(init)
    def wrapped(backend=None, *args, **kwargs):
        return init("cpu:gloo" if backend and ("nccl" in backend or "cpu:" in backend) else backend, *args, **kwargs)

    return wrapped


def _average(dist):
    """gloo neither averages nor scatters sums of one tensor; FSDP2 asks for both."""
    reduce = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op != dist.ReduceOp.AVG:
            return reduce(tensor, op=op, group=group, async_op=async_op)
        work = reduce(tensor, group=group)
        tensor.div_(dist.get_world_size(group))
        return work

    def reduce_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        whole = input.clone()
        all_reduce(whole, op, group)
        output.copy_(whole.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(output))

    dist.all_reduce, dist.reduce_scatter_tensor = all_reduce, reduce_scatter_tensor


def _without_flash_attention():
    """verl names flash_attention_2 in places that no key reaches."""
    from transformers import AutoConfig
    from transformers.models.auto import auto_factory

    for cls in (AutoConfig, auto_factory._BaseAutoModelClass):
        make = cls.from_pretrained.__func__

        def from_pretrained(cls, *args, make=make, **kwargs):
            if kwargs.get("attn_implementation") == "flash_attention_2":
                kwargs["attn_implementation"] = "sdpa"
            return make(cls, *args, **kwargs)

        cls.from_pretrained = classmethod(from_pretrained)


def _without_pinned_memory():
    """The first SFT trainer asks for it, and only an accelerator has it."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    init = StatefulDataLoader.__init__

    @functools.wraps(init)
    def wrapped(self, *args, pin_memory=False, **kwargs):
        init(self, *args, **kwargs)

    StatefulDataLoader.__init__ = wrapped


def patch_verl():
    from verl.utils import device

    device.get_nccl_backend = lambda: "gloo"

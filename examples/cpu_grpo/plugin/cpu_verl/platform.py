"""A verl platform whose device is the CPU."""

from __future__ import annotations

import types
from contextlib import contextmanager

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _CpuDeviceId(str):
    """`tensor.to(it)` means the CPU, while verl's f"{device_name}:{device_id}" gives "cpu:0"."""

    def __format__(self, spec: str) -> str:
        return "0"


CPU = _CpuDeviceId("cpu")


def _device_module() -> types.ModuleType:
    """What verl finds in place of `torch.cuda`."""
    module = types.ModuleType("cpu_verl.device_module")
    module.is_available = lambda: False  # verl then leaves its cache and memory code alone
    module.get_device_name = lambda *_, **__: "CPU"
    module.current_device = lambda: CPU
    module.device_count = lambda: 1
    module.mem_get_info = lambda *_, **__: (1, 1)
    module.get_rng_state, module.set_rng_state = torch.get_rng_state, torch.set_rng_state
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    for name in ("empty_cache", "synchronize", "set_device", "manual_seed", "manual_seed_all"):
        setattr(module, name, lambda *_, **__: None)
    module.reset_peak_memory_stats = lambda *_, **__: None
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """Collectives go over gloo; Ray's `GPU` resource is a mere number here (`ray.init(num_gpus=2)`)."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self):
        return True

    def current_device(self):
        return CPU

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None

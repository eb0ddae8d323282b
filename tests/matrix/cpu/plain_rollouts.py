"""An external module of verl 0.6 to 0.8, which `import verl` imports at its end: rollouts by plain transformers."""

import importlib
import importlib.util


def _register() -> None:
    from verl.workers.rollout import base, replica

    base._ROLLOUT_REGISTRY["hf", "sync"] = f"{__name__}.plain_rollout"  # 0.6 has the class, but does not name it
    base._ROLLOUT_REGISTRY["tiny", "async"] = "tiny_rollout.TinyRollout"
    replica.RolloutReplicaRegistry.register("tiny", lambda: importlib.import_module("tiny_rollout").TinyReplica)


def plain_rollout(config, model_config, device_mesh):
    """verl 0.6's own rollout by transformers, with a module of its own to which the trainer sends its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.workers.rollout.base import BaseRollout
    from verl.workers.rollout.hf_rollout import HFRollout

    class PlainRollout(HFRollout):
        def __init__(self):
            BaseRollout.__init__(self, config, model_config, device_mesh)
            self.module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_config.local_path))
            self.module.float().eval()

        async def resume(self, tags):
            pass

        async def release(self):
            pass

        async def update_weights(self, weights, **kwargs):
            self.module.load_state_dict({name: tensor.detach().clone() for name, tensor in weights}, strict=False)

    return PlainRollout()


def _patch() -> None:
    """What these releases offer to GPUs and NPUs only."""
    from verl.utils.profiler import performance

    performance.topk_reduce_ratio_min_max = lambda timing, k=10: (0.0, 0.0, 0.0)  # gloo refuses its gather
    if importlib.util.find_spec("verl.utils.npu_flash_attn_utils"):  # the padding of flash-attn, in plain torch
        from verl.utils import attention_utils, npu_flash_attn_utils

        names = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
        attention_utils._get_attention_functions = lambda: tuple(getattr(npu_flash_attn_utils, n) for n in names)
    if importlib.util.find_spec("verl.workers.engine"):
        from verl.workers.engine import base

        base.get_device_name = lambda: "cuda"  # the key under which its FSDP engines are registered


_register()
_patch()

"""Lets an unmodified verl train on a machine without any accelerator.

verl imports this package at the end of `import verl`, in the driver and in every Ray
process, when `VERL_USE_EXTERNAL_MODULES=cpu_verl`. `VERL_PLATFORM=cpu` then picks the
platform registered here and `actor_rollout_ref.rollout.name=tiny` the rollout.
"""

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from cpu_verl import patches, platform  # noqa: F401  # importing registers the platform


def _load_replica():
    from tiny_rollout import TinyReplica

    return TinyReplica


RolloutReplicaRegistry.register("tiny", _load_replica)
_ROLLOUT_REGISTRY["tiny", "async"] = "tiny_rollout.TinyRollout"
patches.apply()

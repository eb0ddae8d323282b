"""The dtype of each tensor on disk: the one that `from_pretrained(dtype=…)` would give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from verl_autoexport.shards.manifest import FLOATING, ShardManifest

if TYPE_CHECKING:
    from verl_autoexport.model.skeleton import Skeleton

OWN_DTYPES = ("source", "base")
"""The export dtypes with which each tensor has its own dtype."""


def disk_dtype(skeleton: Skeleton, fqn: str, source: str, dtype: str) -> str:
    """The dtype on disk of a tensor that has the dtype `source` in the shards, exported in `dtype`."""
    return source if source not in FLOATING or dtype in OWN_DTYPES else skeleton.dtype_of(fqn, dtype)


def model_dtype(skeleton: Skeleton, manifest: ShardManifest, dtype: str) -> str:
    """transformers' dtype of the model exported in `dtype`: that of its first floating parameter."""
    found = {name: entry.value_dtype for name, entry in manifest.tensors.items()}
    if manifest.on_disk:
        found = {skeleton.place(name)[0]: source for name, source in found.items()}
    held = ((name, found[name]) for name in skeleton.tensors if name in found)
    return next(disk_dtype(skeleton, name, source, dtype) for name, source in held if source in FLOATING)

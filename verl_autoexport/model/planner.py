"""The plan of an export: the model that the shards are, and the outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from verl_autoexport.config.schema import ExportOptions
from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import MergePlan, Output, make_plan, one_file_plan
from verl_autoexport.merge.reader import equal_values
from verl_autoexport.model.base_compatibility import Compatibility, apply_base, carry, check_compatibility
from verl_autoexport.model.conversion import tied_aliases
from verl_autoexport.model.dtypes import OWN_DTYPES, disk_dtype
from verl_autoexport.model.lora import adapter as lora
from verl_autoexport.model.lora.fusion import Fusion
from verl_autoexport.model.shard_names import by_memory, whole_model
from verl_autoexport.model.skeleton import Skeleton, build_skeleton, import_external
from verl_autoexport.model.transformers_skeleton import TransformersSkeleton
from verl_autoexport.model.value_head import Head, find_head
from verl_autoexport.shards.checksums import Run, Sums
from verl_autoexport.shards.manifest import ShardManifest, diverged

ADAPTER_FOLDER = "adapter"
"""The adapter's folder in a version that also has the fused model."""


@dataclass(frozen=True)
class Planned:
    """A planned export: `manifest` has every tensor that `plan` reads.

    `skeleton` is the model without weights, `compatibility` its comparison with the base, `read` describes
    everything that was read of files with records, `renamed`: some shards have other names than in memory.
    """

    skeleton: Skeleton
    manifest: ShardManifest
    plan: MergePlan
    compatibility: Compatibility
    adapter: lora.Adapter | None = None
    read: tuple[Run, ...] = ()
    renamed: bool = False


def plan_model(
    options: ExportOptions,
    checkpoint: Path,
    saved: Path,
    manifest: ShardManifest,
    *,
    frozen: Collection[str] | None = None,
    grouped: Collection[str] = (),
    values: bool = True,
) -> Planned:
    """The plan of an export; raises PlanError unless the shards are the whole model, and the base's kind of model.

    `checkpoint` is the directory with the rank files, `saved` the one with the run's `config.json`, `frozen` and
    `grouped` are those of `ExportSpec`. `values`: compare the values of tied tensors; without it only
    `manifest` is read.
    """
    skeleton, head = _skeleton(options, saved, manifest)
    adapter = lora.read_adapter(manifest, skeleton, checkpoint, options.lora_config)
    if adapter is None and options.lora != "fused":
        raise PlanError(f"{checkpoint}: lora={options.lora}, but the shards hold no LoRA weights.")
    if adapter is not None and options.lora == "adapter":
        plan = one_file_plan(lora.plan_adapter(adapter, manifest, options.dtype))
        return Planned(
            skeleton, manifest, plan, Compatibility(reason="an adapter holds none of the base's tensors"), adapter
        )
    if adapter is None:
        (held, outputs), fusions = whole_model(skeleton, manifest, options.dtype), {}
    else:
        held, outputs = lora.model_outputs(adapter, manifest, skeleton, options.dtype, options.base_model)
        held, fusions = lora.with_adapter(held, manifest, adapter), adapter.fusions
    renamed, sums = adapter is None and not manifest.tensors.keys() <= skeleton.tensors.keys(), Sums()
    if values:
        _check_tied(skeleton, held, sums)
    compatibility = check_compatibility(
        skeleton, head, outputs, options.base_model, base_check=options.base_check, carry_unread=options.carry_unread
    )
    outputs = apply_base(outputs, compatibility, options.dtype)
    if fused := sorted(o.name for o in outputs if any(p.fqn in fusions for p in o.pieces)):
        compatibility = replace(compatibility, explained={**compatibility.explained, "LoRA fused in": tuple(fused)})
    apart = _frozen_outputs(frozen, grouped, outputs, fusions, compatibility)
    held, outputs = carry(compatibility, held, outputs, options.dtype)
    plan = make_plan(held, outputs, options.max_shard_size, fusions, apart)
    if adapter is not None and options.lora == "both":
        plan = replace(plan, files=(*plan.files, lora.plan_adapter(adapter, held, options.dtype, f"{ADAPTER_FOLDER}/")))
    return Planned(skeleton, held, plan, compatibility, adapter, sums.runs(), renamed)


def _frozen_outputs(
    frozen: Collection[str] | None,
    grouped: Collection[str],
    outputs: Sequence[Output],
    fusions: Mapping[str, Fusion],
    compatibility: Compatibility,
) -> set[str]:
    """The names on disk of frozen tensors; if they are unknown, the names that an earlier version keeps apart."""
    if frozen is None:
        return set(grouped)
    names = {lora.plain_name(fqn) for fqn in frozen}
    kept = {o.name for o in outputs if all(p.fqn in names and p.fqn not in fusions for p in o.pieces)}
    return kept.union(compatibility.carried)


def capture_dtypes(options: ExportOptions, planned: Planned) -> dict[str, str]:
    """{fqn: dtype} that a copy of the source tensors may already have; empty if the merge needs their own dtypes."""
    if planned.adapter is not None or options.dtype in OWN_DTYPES:
        return {}
    held, carried = planned.manifest.tensors, planned.compatibility.carried
    return {k: disk_dtype(planned.skeleton, k, t.dtype, options.dtype) for k, t in held.items() if k not in carried}


def tied_shards(planned: Planned) -> dict[str, str]:
    """{alias: name it is tied to} in the model, by the shards' names, if both are in the shards."""
    tied = planned.skeleton.tied
    if planned.adapter is None:
        return dict(tied)
    base = planned.adapter.base
    return {base[alias]: base[name] for alias, name in tied.items() if alias in base and name in base}


def _skeleton(options: ExportOptions, saved: Path, manifest: ShardManifest) -> tuple[Skeleton, Head | None]:
    """The model of the shards: the one in `config.json`, or the value model made from it."""
    import_external(options.external_lib)
    skeleton = build_skeleton(saved, options.dtype, options.trust_remote_code)
    held = by_memory(skeleton, manifest) if manifest.on_disk else manifest
    head = find_head(skeleton, saved, lora.plain_shapes(held))
    if head is not None:
        trusted, name = skeleton.trust_remote_code, head.architecture
        skeleton = TransformersSkeleton.of(saved, options.dtype, trusted, name, head.num_labels)
    return skeleton, head


def _check_tied(skeleton: Skeleton, manifest: ShardManifest, sums: Sums) -> None:
    for alias, name in tied_aliases(skeleton, manifest).items():
        if not equal_values(manifest, alias, name, sums):
            raise PlanError(diverged(alias, name))

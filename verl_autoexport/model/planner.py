"""Which model the shards are, and what will be written of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.merge.plan import Fusion, MergePlan, Output, make_plan, one_file_plan
from verl_autoexport.merge.reader import equal_values
from verl_autoexport.model import skeleton as naming
from verl_autoexport.model.base_compatibility import Contract, apply_base, carry, check_contract
from verl_autoexport.model.lora import adapter as lora
from verl_autoexport.model.spec import ExportSpec
from verl_autoexport.model.value_head import Head, find_head
from verl_autoexport.shards.checksums import Run, Sums
from verl_autoexport.shards.manifest import ShardManifest, diverged

ADAPTER_FOLDER = "adapter"
"""Where the adapter is in a version that has the fused model too."""


@dataclass(frozen=True)
class Planned:
    """What will be written, and of what: `manifest` has every tensor that `plan` reads.

    `skeleton` is the model on the meta device, `contract` how it differs from the base, `read` all that was
    read of files with records.
    """

    skeleton: Any
    manifest: ShardManifest
    plan: MergePlan
    contract: Contract
    adapter: lora.Adapter | None = None
    read: tuple[Run, ...] = ()


def plan_model(spec: ExportSpec, manifest: ShardManifest, values: bool = True) -> Planned:
    """Raises PlanError unless the shards are the whole model, and the base's kind of model.

    `values`: those of tied tensors are compared; without, nothing but `manifest` is read.
    """
    skeleton, head = _skeleton(spec, manifest)
    adapter = lora.read_adapter(manifest, skeleton, spec.checkpoint, spec.lora_config)
    if adapter is None and spec.lora != "fused":
        raise PlanError(f"{spec.checkpoint}: lora={spec.lora}, but the shards hold no LoRA weights.")
    if spec.lora == "adapter":
        plan = one_file_plan(lora.plan_adapter(adapter, manifest, spec.dtype))
        return Planned(
            skeleton, manifest, plan, Contract(reason="an adapter holds none of the base's tensors"), adapter
        )
    if adapter is None:
        held, outputs, fusions = manifest, naming.name_outputs(skeleton, manifest, spec.dtype), {}
    else:
        held, outputs = lora.model_outputs(adapter, manifest, skeleton, spec.dtype, spec.base_model)
        held, fusions = lora.with_adapter(held, manifest, adapter), adapter.fusions
    sums = Sums()
    if values:
        _check_tied(skeleton, held, sums)
    contract = check_contract(
        skeleton, head, outputs, spec.base_model, spec.trust_remote_code,
        base_check=spec.base_check, carry_unread=spec.carry_unread,
    )  # fmt: skip
    outputs = apply_base(outputs, contract, spec.dtype)
    if fused := sorted(o.name for o in outputs if any(p.fqn in fusions for p in o.pieces)):
        contract = replace(contract, explained={**contract.explained, "LoRA fused in": tuple(fused)})
    apart = _unchanging(spec, outputs, fusions, contract)
    held, outputs = carry(contract, held, outputs, spec.dtype)
    plan = make_plan(held, outputs, spec.max_shard_size, fusions, apart)
    if spec.lora == "both":
        plan = replace(plan, files=(*plan.files, lora.plan_adapter(adapter, held, spec.dtype, f"{ADAPTER_FOLDER}/")))
    return Planned(skeleton, held, plan, contract, adapter, sums.runs())


def _unchanging(
    spec: ExportSpec, outputs: Sequence[Output], fusions: Mapping[str, Fusion], contract: Contract
) -> set[str]:
    """Names on disk of what training leaves as it is; where that is not known, what an earlier version keeps apart."""
    if spec.frozen is None:
        return set(spec.grouped)
    frozen = {lora.plain_name(fqn) for fqn in spec.frozen}
    kept = {o.name for o in outputs if all(p.fqn in frozen and p.fqn not in fusions for p in o.pieces)}
    return kept.union(contract.carried)


def capture_dtypes(spec: ExportSpec, planned: Planned) -> dict[str, str]:
    """{fqn: dtype} that a copy of the source tensors may have already; none where the merge needs their own."""
    if planned.adapter is not None or spec.dtype in naming.OWN_DTYPES:
        return {}
    rule = naming.DtypeRule(planned.skeleton, spec.dtype)
    carried = planned.contract.carried
    return {fqn: rule(fqn, t.dtype) for fqn, t in planned.manifest.tensors.items() if fqn not in carried}


def tied_names(planned: Planned) -> dict[str, str]:
    """{alias: name it is tied to} of the model, as the shards name them where they hold both."""
    tied = getattr(planned.skeleton, "all_tied_weights_keys", None) or {}
    if planned.adapter is None:
        return dict(tied)
    base = planned.adapter.base
    return {base[alias]: base[name] for alias, name in tied.items() if alias in base and name in base}


def _skeleton(spec: ExportSpec, manifest: ShardManifest) -> tuple[Any, Head | None]:
    """The model of the shards: that of `config.json`, or the value model that was made of it."""
    options = {"trust_remote_code": spec.trust_remote_code, "external_lib": spec.external_lib}
    skeleton = naming.build_skeleton(spec.model_dir, spec.dtype, **options)
    head = find_head(skeleton, spec.model_dir, lora.plain_shapes(manifest), spec.trust_remote_code)
    if head is not None:
        options |= {"architecture": head.architecture, "num_labels": head.num_labels}
        skeleton = naming.build_skeleton(spec.model_dir, spec.dtype, **options)
    return skeleton, head


def _check_tied(skeleton: Any, manifest: ShardManifest, sums: Sums) -> None:
    for alias, name in naming.tied_aliases(skeleton, manifest).items():
        if not equal_values(manifest, alias, name, sums):
            raise PlanError(diverged(alias, name))

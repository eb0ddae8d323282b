"""LoRA: a PEFT checkpoint split into base and adapter, fused as PEFT fuses it, or written as PEFT writes it.

Names in the shards are those of `PeftModel.state_dict()`: `base_model.model.` before the
base model's own name, `X.base_layer.weight` for a target's own weight, `X.lora_A.default.weight`,
`X.modules_to_save.default.weight`. With verl's `save_lora_only` only those with `lora_` are there.
The settings that names and shapes do not show (alpha, rsLoRA, patterns) are in verl's
`lora_train_meta.json` or in PEFT's own `adapter_config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_autoexport.errors import MergeError, PlanError
from verl_autoexport.merge.job import WrittenFile
from verl_autoexport.merge.plan import Output, PlannedFile, plan_one, whole
from verl_autoexport.model.base_model import base_directory, with_files
from verl_autoexport.model.conversion import name_outputs, spell
from verl_autoexport.model.dtypes import OWN_DTYPES, disk_dtype
from verl_autoexport.model.lora import peft_config
from verl_autoexport.model.lora.fusion import Fusion
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.shards.manifest import FLOATING, ShardManifest, TensorEntry
from verl_autoexport.shards.safetensors_files import model_files

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(lora_[A-Za-z_]+)\.([^.]+)(\.weight|\.bias)?")
_SAVED = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")
_PARTS = ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})
_OPTIONAL = {"lora_magnitude_vector.weight", "lora_B.bias"}


@dataclass(frozen=True)
class Adapter:
    """The content of a PEFT checkpoint.

    `base`: the base model's in-memory names → names in the shards, empty if only the adapter
    was saved. `tensors`: names in `adapter_model.safetensors` → names in the shards. `fusions`
    are by the base's in-memory name. `config` is `adapter_config.json`, `dtype` that of lora_B.
    """

    base: Mapping[str, str]
    tensors: Mapping[str, str]
    fusions: Mapping[str, Fusion]
    config: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True)
class _Names:
    base: dict[str, str]
    lora: dict[str, dict[str, str]]  # module → part of it → name in the shards
    saved: dict[str, str]
    tensors: dict[str, str]


def read_adapter(
    manifest: ShardManifest, skeleton: Skeleton, checkpoint: Path, config: Path | None = None
) -> Adapter | None:
    """The adapter in the shards, None if there is none; `config` is an `adapter_config.json` or its directory.

    Raises PlanError, naming the missing part, for an adapter that cannot be fused.
    """
    if not is_lora(manifest):
        return None
    names = _read_names(manifest)
    _check_whole(names, skeleton)
    settings, where = peft_config.read_settings(checkpoint, config)
    fusions: dict[str, Fusion] = {}
    for module, parts in names.lora.items():
        fusions |= _fusions(module, parts, manifest, skeleton, settings, where)
    if (settings["modules_to_save"] and not names.saved) or (settings["bias"] != "none" and not names.base):
        raise PlanError(
            f"{where}: modules_to_save={settings['modules_to_save']}, bias={settings['bias']}, but the shards lack"
            " those weights; save_lora_only leaves them out: save whole checkpoints."
        )
    rule = _module_names(list(names.lora), skeleton)
    saved = _module_names(sorted({k.rpartition(".")[0] for k in names.saved}), skeleton, loose=True) or None
    dora = any("lora_magnitude_vector.weight" in p for p in names.lora.values())
    if settings["use_dora"] and not dora:
        raise PlanError(f"{where}: use_dora is true, but the shards hold no lora_magnitude_vector.")
    found = {
        "target_modules": rule,
        "modules_to_save": saved,
        "use_dora": dora,
        "lora_bias": any("lora_B.bias" in p for p in names.lora.values()),
        "fan_in_fan_out": any(f.transposed for f in fusions.values()),
        "init_lora_weights": True,
    }
    first = next(iter(fusions.values()))
    return Adapter(names.base | names.saved, names.tensors, fusions, settings | found, manifest.tensors[first.b].dtype)


def plain_shapes(manifest: ShardManifest) -> dict[str, tuple[int, ...]]:
    """The shapes, by the tensors' names in the model without LoRA; the adapter's own tensors are left out."""
    if not is_lora(manifest):
        return {fqn: t.shape for fqn, t in manifest.tensors.items()}
    names = _read_names(manifest)
    return {name: manifest.tensors[fqn].shape for name, fqn in (names.base | names.saved).items()}


def is_lora(manifest: ShardManifest) -> bool:
    """Whether the shards are from a PEFT model."""
    return any(k.startswith(_PREFIX) or ".lora_" in k for k in manifest.tensors)


def plain_name(fqn: str) -> str:
    """The name of a base model's tensor without PEFT's additions."""
    return fqn.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _read_names(manifest: ShardManifest) -> _Names:
    names = _Names({}, {}, {}, {})
    adapters: set[str] = set()
    for fqn in manifest.tensors:
        name = fqn.removeprefix(_PREFIX)
        if name == fqn:
            lora = next(k for k in manifest.tensors if k.startswith(_PREFIX) or ".lora_" in k)
            raise PlanError(
                f"the shards hold LoRA weights ({lora}), but {fqn} has no {_PREFIX!r} before it: not the names of a "
                "PeftModel; it is unknown how they belong together."
            )
        if match := _LORA.fullmatch(name):
            module, part, adapter, leaf = match.groups()
            names.lora.setdefault(module, {})[part + (leaf or "")] = fqn
            leaf = None if part == "lora_magnitude_vector" else leaf  # PEFT's file keeps DoRA's older name
            names.tensors[f"{_PREFIX}{module}.{part}{leaf or ''}"] = fqn
        elif match := _SAVED.fullmatch(name):
            module, adapter, leaf = match.groups()
            names.saved[f"{module}.{leaf}"] = fqn
            names.tensors[f"{_PREFIX}{module}.{leaf}"] = fqn
        elif ".original_module." in name:
            continue  # replaced by modules_to_save
        else:
            names.base[plain_name(fqn)] = fqn
            continue
        adapters.add(adapter)
    if len(adapters) != 1 or not names.lora:
        raise PlanError(
            f"the shards hold {len(adapters)} LoRA adapters ({sorted(adapters)}); exactly one is supported."
        )
    return names


def _check_whole(names: _Names, skeleton: Skeleton) -> None:
    """Raises for a target whose LoRA is lost; it would come out as in the base, and no later check could notice."""
    wrapped = {name.rpartition(".")[0] for name, fqn in names.base.items() if ".base_layer." in fqn}
    if lost := sorted(wrapped - names.lora.keys()):
        raise PlanError(f"{_PREFIX}{lost[0]}: wrapped for LoRA, but the shards hold no lora_A and lora_B for it.")
    plain = sorted(m for m, parts in names.lora.items() if "lora_magnitude_vector.weight" not in parts)
    if plain and len(plain) < len(names.lora):
        raise PlanError(f"{_PREFIX}{plain[0]}: no lora_magnitude_vector, though other modules have one (DoRA).")
    known = skeleton.tensors.keys()
    if strange := sorted(fqn for name, fqn in names.base.items() if name not in known):
        raise PlanError(
            f"{strange[0]} (… {len(strange)} in all): unexpected beside LoRA weights: no tensor of "
            f"{skeleton.name}, nor one of PEFT's that is supported."
        )


def _fusions(
    module: str,
    parts: Mapping[str, str],
    manifest: ShardManifest,
    skeleton: Skeleton,
    settings: Mapping[str, Any],
    where: str,
) -> dict[str, Fusion]:
    """The fusions of `module`: its weight, and with `lora_bias` its bias, from the base's and the LoRA `parts`."""
    needed = next((p for p in _PARTS if p <= parts.keys()), None)
    weight = skeleton.tensors.get(f"{module}.weight")
    if needed is None or parts.keys() - needed - _OPTIONAL:
        raise PlanError(f"{_PREFIX}{module}: LoRA of {sorted(parts)} is not supported; expected lora_A and lora_B.")
    if weight is None or weight.ndim != 2:
        found = "a parameter without a module" if weight is None else f"a weight of shape {list(weight.shape)}"
        raise PlanError(
            f"{parts[min(parts)]}: LoRA on {found} ({module}) is not supported; only on linear layers and embeddings."
        )
    first, second = sorted(needed)
    a, b = manifest.tensors[parts[first]], manifest.tensors[parts[second]]
    embedding = first == "lora_embedding_A"
    transposed = not embedding and skeleton.modules.get(module) == "Conv1D"
    r, scaling = peft_config.scaling(module, settings)
    if a.shape[:1] != (r,):
        raise PlanError(
            f"{a.fqn}: rank {a.shape[0]} by its shape, {r} according to {where}: with a rank pattern lora_alpha may "
            f"differ too. Give the adapter's own {peft_config.CONFIG_NAME} (`--lora-config`)."
        )
    product = b.shape[:1] + a.shape[1:]
    if b.shape[1:] != (r,) or tuple(weight.shape) != (product[::-1] if embedding or transposed else product):
        raise PlanError(
            f"{a.fqn} {list(a.shape)} and {b.fqn} {list(b.shape)} do not fit a weight {list(weight.shape)}."
        )
    kind = "embedding" if embedding else "linear"
    magnitude = parts.get("lora_magnitude_vector.weight")
    made = {f"{module}.weight": Fusion(kind, a.fqn, b.fqn, scaling, magnitude, transposed)}
    if bias := parts.get("lora_B.bias"):
        made[f"{module}.bias"] = Fusion("bias", None, bias, scaling)
    return made


def _module_names(modules: Sequence[str], skeleton: Skeleton, loose: bool = False) -> list[str]:
    """The last parts of `modules`, as people write them, if those mean exactly these modules; otherwise whole names.

    PEFT matches modules_to_save loosely (`loose`): `norm` means `input_layernorm` too.
    """
    leaves = sorted({m.rpartition(".")[2] for m in modules})
    meant = {n for n in skeleton.modules if (n.endswith(tuple(leaves)) if loose else n.rpartition(".")[2] in leaves)}
    return leaves if meant == set(modules) else list(modules)


def model_outputs(
    adapter: Adapter, manifest: ShardManifest, skeleton: Skeleton, dtype: str, base_model: str | None
) -> tuple[ShardManifest, list[Output]]:
    """The fused model: the manifest of all its tensors, and its outputs."""
    if adapter.base:
        tensors = {name: replace(manifest.tensors[fqn], fqn=name) for name, fqn in adapter.base.items()}
        held = replace(manifest, tensors=tensors)
        outputs = name_outputs(skeleton, held, dtype)
    else:
        held, outputs = _from_base(adapter, manifest, skeleton, dtype, base_model)
    written = {p.fqn for o in outputs for p in o.pieces}
    for name in adapter.fusions:
        tied = _tied_with(skeleton, name)
        if name not in written and not tied:
            raise PlanError(f"{name}: the shards hold LoRA for it, but {skeleton.name} writes no such tensor.")
        if tied:
            raise PlanError(
                f"{name} is tied with {', '.join(tied)}, and only one of them carries LoRA: fused "
                "they would no longer be equal. Export the adapter instead (lora: adapter)."
            )
    return held, outputs


def with_adapter(held: ShardManifest, manifest: ShardManifest, adapter: Adapter) -> ShardManifest:
    """The manifest `held`, with the adapter's tensors under their names in the shards."""
    return replace(held, tensors={**held.tensors, **{fqn: manifest.tensors[fqn] for fqn in adapter.tensors.values()}})


def _tied_with(skeleton: Skeleton, name: str) -> list[str]:
    tied = skeleton.tied
    return sorted({tied[name]} if name in tied else {alias for alias, target in tied.items() if target == name})


def _from_base(
    adapter: Adapter, manifest: ShardManifest, skeleton: Skeleton, dtype: str, base_model: str | None
) -> tuple[ShardManifest, list[Output]]:
    """The fused model with a base from safetensors files, with names on disk, trained in the adapter's dtype."""
    directory = base_directory(base_model)
    if directory is None:
        raise PlanError(
            "the checkpoint holds the LoRA weights only (save_lora_only): the base model's weights are needed, as a "
            f"directory with safetensors files (`--base-model DIR`); found {base_model!r}."
        )
    disk = model_files(directory)
    wanted = {}
    for name, t in skeleton.tensors.items():
        if name not in skeleton.tied:
            loaded = disk_dtype(skeleton, name, str(t.dtype).removeprefix("torch."), adapter.dtype)
            wanted[name] = TensorEntry(name, loaded, tuple(t.shape), ())
    tensors: dict[str, TensorEntry] = {}
    outputs = []
    named = name_outputs(skeleton, replace(disk, tensors=wanted), dtype)
    for output in spell(skeleton, named, disk.tensors).apply(named):
        sources = {p.fqn for p in output.pieces}
        entry = _of_base(disk, output, directory)
        straight = output.pieces == whole(output.pieces[0].fqn, output.shape)
        if not straight and sources & adapter.fusions.keys():
            raise PlanError(f"{output.name}: LoRA on a tensor with another layout in {directory} is not supported.")
        name = output.pieces[0].fqn if straight else output.name
        cast = wanted[output.pieces[0].fqn].dtype if entry.dtype in FLOATING else None
        tensors[name] = replace(entry, fqn=name, loaded=cast)
        outputs.append(replace(output, pieces=whole(name, output.shape)))
    return with_files(replace(manifest, tensors={}), disk, tensors), outputs


def _of_base(disk: ShardManifest, output: Output, directory: Path) -> TensorEntry:
    entry = disk.tensors.get(output.name)
    if entry is None or entry.shape != output.shape:
        found = "nothing" if entry is None else list(entry.shape)
        raise PlanError(
            f"{directory}: {output.name}: expected {list(output.shape)}, found {found}: not the base of this run, or "
            "resized in it, or its files have another layout than transformers writes. Save whole checkpoints."
        )
    if output.dtype in FLOATING and entry.dtype not in FLOATING:
        raise PlanError(
            f"{directory}: {output.name} is {entry.dtype}: LoRA cannot be fused into a quantized base. Name a "
            "dequantized copy (--base-model), save whole checkpoints, or export the adapter alone (lora: adapter)."
        )
    return entry


def plan_adapter(adapter: Adapter, manifest: ShardManifest, dtype: str, folder: str = "") -> PlannedFile:
    """The file `adapter_model.safetensors`, in `folder` of the version, with its floating tensors in `dtype`."""
    if adapter.config["bias"] != "none":
        raise PlanError(f"bias={adapter.config['bias']}: an adapter with trained biases is not supported; use fused.")
    outputs = []
    for name, fqn in sorted(adapter.tensors.items()):
        entry = manifest.tensors[fqn]
        cast = entry.dtype if dtype in OWN_DTYPES or entry.dtype not in FLOATING else dtype
        outputs.append(Output(name, entry.shape, cast, whole(fqn, entry.shape)))
    return plan_one(manifest, outputs, f"{folder}{WEIGHTS_NAME}")


def check_written(adapter: Adapter, written: Sequence[WrittenFile], mode: str, dtype: str) -> list[str]:
    """Notes on the adapter; raises MergeError if fusing it changed no tensor."""
    r, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    size = f"r {r}, lora_alpha {alpha}"
    if mode == "adapter":
        return [f"LoRA adapter of {len(adapter.tensors)} tensors, {size}; the base model is not included"]
    trained = frozenset().union(*(w.affected for w in written))
    changed = frozenset().union(*(w.changed for w in written))
    if not trained:
        return [
            f"LoRA fused into {len(adapter.fusions)} tensors, {size}; every lora_B is zero, so nothing was learned yet"
        ]
    if not changed:
        raise MergeError(
            f"LoRA was fused into {len(adapter.fusions)} tensors and none of them changed in {dtype}, though lora_B is "
            "not zero: the result is the base model. If the adapter is that small, export float32 or the adapter."
        )
    return [f"LoRA fused into {len(adapter.fusions)} tensors, {size}; {len(changed)} of them differ from the base"]

"""The only place that orders the stages: gather, plan, merge, assets, verify, publish."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from verl_autoexport.config import VerifyConfig, parse_size
from verl_autoexport.errors import AutoExportError, ConfigError, MergeError, PlanError, SourceError
from verl_autoexport.events import ExportRecord, Trigger
from verl_autoexport.export import assets, naming, verify
from verl_autoexport.export.base import BaseModel
from verl_autoexport.export.contract import Contract, apply_base, check_contract
from verl_autoexport.export.heads import Head, find_head
from verl_autoexport.export.merge import MergeJob, WrittenFile, equal_values
from verl_autoexport.export.plan import INDEX_NAME, MergePlan, make_plan
from verl_autoexport.export.record import make_record
from verl_autoexport.registry.store import Registry, Version
from verl_autoexport.sources.base import ShardManifest
from verl_autoexport.sources.fsdp_files import FsdpFiles, find_checkpoint

RECORD_NAME = "export.json"
_SPARE = 64 << 20  # bytes of disk left free beyond the estimate


@dataclass(frozen=True)
class ExportSpec:
    """One export: what to read, how to write it, and what to say of it.

    `checkpoint` is the directory with the rank files (a pin, or verl's own), `origin` the
    path to record. `memory_budget` and `max_shard_size` are bytes, `stall_s` seconds.
    """

    checkpoint: Path
    step: int
    dtype: str = "bfloat16"
    max_shard_size: int = 5 * 10**9
    memory_budget: int = 1 << 30
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    trust_remote_code: bool = False
    external_lib: str | None = None
    triggers: tuple[Trigger, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    measured_on: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    origin: str | None = None
    stall_s: float = 0.0
    fingerprint: str | None = None


class MergeRunner(Protocol):
    """Runs merge jobs somewhere; `progress` gets bytes as they are written, where that is known."""

    def run(self, jobs: Sequence[MergeJob], progress: Callable[[int], None]) -> list[WrittenFile]: ...


class LocalRunner:
    """Merges in this process, or with `workers` > 1 in that many local processes."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or min(4, os.cpu_count() or 1)

    def run(self, jobs: Sequence[MergeJob], progress: Callable[[int], None]) -> list[WrittenFile]:
        if min(self.workers, len(jobs)) == 1:
            return [job.run(progress) for job in jobs]
        written = []
        with ProcessPoolExecutor(min(self.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            for file in pool.map(MergeJob.run, jobs):
                progress(file.nbytes)
                written.append(file)
        return written


class Progress(Protocol):
    """Told what happens; the command line shows it, a training run ignores it."""

    def stage(self, name: str, total: int | None = None) -> None: ...

    def advance(self, nbytes: int) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


def export_to_registry(
    spec: ExportSpec, registry: Registry, runner: MergeRunner, progress: Progress | None = None
) -> Version:
    """Export into `registry` as its next version; raises AutoExportError and leaves nothing visible."""
    staging = registry.stage(f"step{spec.step}")
    try:
        return registry.publish(staging, run_export(spec, staging.path, runner, progress))
    except BaseException:
        with suppress(AutoExportError):  # the reason to tell is the first one; `recover` removes what is left
            registry.discard(staging)
        raise


def export_to_directory(
    spec: ExportSpec, output: Path, runner: MergeRunner, progress: Progress | None = None
) -> ExportRecord:
    """Export to a directory of its own, which appears whole or not at all.

    Raises ConfigError when `output` exists and is not an empty directory.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"--output {output}: exists and is not empty; nothing is overwritten. Name another directory."
        )
    output = output.absolute()
    staging = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as e:
        raise ConfigError(f"--output {output}: cannot be written: {e.strerror}.") from e
    try:
        record = run_export(spec, staging, runner, progress)
        (staging / RECORD_NAME).write_text(json.dumps(record.to_dict(), indent=2) + "\n")
        if output.exists():
            output.rmdir()
        staging.rename(output)
        return record
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def run_export(spec: ExportSpec, target: Path, runner: MergeRunner, progress: Progress | None = None) -> ExportRecord:
    """Make a complete, verified model directory in `target` (empty, on the output's file system)."""
    progress = progress or Silent()
    timings = {"stall": spec.stall_s}
    with _timed(timings, "gather"):
        progress.stage("reading shards")
        source = FsdpFiles(spec.checkpoint)
        if spec.fingerprint and source.fingerprint != spec.fingerprint:
            raise SourceError(
                f"{spec.checkpoint}: the shards are no longer those of step {spec.step} as it was chosen: fingerprint "
                f"{spec.fingerprint} expected, {source.fingerprint} found. The step was saved again meanwhile."
            )
        manifest = source.manifest()
        model_dir = spec.checkpoint / "huggingface"
        skeleton, plan, contract = plan_model(spec, manifest, model_dir)
        _check_space(target, plan)
    with _timed(timings, "merge"):
        progress.stage("merging", plan.nbytes)
        architecture = naming.architecture(skeleton.config)
        written = runner.run(_jobs(spec, plan, manifest, target, model_dir, architecture), progress.advance)
        if plan.index is not None:
            (target / INDEX_NAME).write_text(json.dumps(plan.index, indent=2) + "\n")
        notes = _write_assets(spec, skeleton, manifest, contract.base, model_dir, target)
    with _timed(timings, "verify"):
        progress.stage("verifying")
        checks = _verify(spec, target, plan, contract)
        source.check_unchanged()
    return make_record(spec, target, manifest, plan, written, checks, timings, (architecture,), notes)


def plan_model(spec: ExportSpec, manifest: ShardManifest, model_dir: Path) -> tuple[Any, MergePlan, Contract]:
    """The skeleton, the plan of what will be written, and how that differs from the base model.

    Raises PlanError unless the shards are the whole model, and the base's kind of model.
    """
    skeleton, head = _skeleton(spec, manifest, model_dir)
    groups = naming.name_outputs(skeleton, manifest, spec.dtype)
    for alias, name in naming.tied_aliases(skeleton, manifest).items():
        if not equal_values(manifest, alias, name):
            raise PlanError(
                f"{alias} and {name} are tied according to config.json, but their values differ: writing one of them "
                "would lose the other. Set tie_word_embeddings=false in the model's config if it was trained untied."
            )
    contract = check_contract(skeleton, head, groups, spec.base_model, spec.trust_remote_code)
    groups = apply_base(groups, contract, spec.dtype)
    return skeleton, make_plan(manifest, groups, spec.max_shard_size), contract


def _skeleton(spec: ExportSpec, manifest: ShardManifest, model_dir: Path) -> tuple[Any, Head | None]:
    """The model of the shards: that of `config.json`, or the value model that was made of it."""
    options = {"trust_remote_code": spec.trust_remote_code, "external_lib": spec.external_lib}
    skeleton = naming.build_skeleton(model_dir, spec.dtype, **options)
    shapes = {fqn: t.shape for fqn, t in manifest.tensors.items()}
    head = find_head(skeleton, model_dir, shapes, spec.trust_remote_code)
    if head is not None:
        options |= {"architecture": head.architecture, "num_labels": head.num_labels}
        skeleton = naming.build_skeleton(model_dir, spec.dtype, **options)
    return skeleton, head


def _jobs(
    spec: ExportSpec, plan: MergePlan, manifest: ShardManifest, target: Path, model_dir: Path, architecture: str
) -> list[MergeJob]:
    jobs = []
    for file in plan.files:
        needed = {g.fqn: manifest.tensors[g.fqn] for g in file.groups}
        jobs.append(
            MergeJob(
                planned=file,
                manifest=replace(manifest, tensors=needed),
                path=target / file.name,
                memory_budget=spec.memory_budget,
                model_dir=model_dir,
                dtype=spec.dtype,
                trust_remote_code=spec.trust_remote_code,
                external_lib=spec.external_lib,
                architecture=architecture,
            )
        )
    return jobs


def _write_assets(
    spec: ExportSpec, skeleton: Any, manifest: ShardManifest, base: BaseModel | None, model_dir: Path, target: Path
) -> list[str]:
    """Everything but the weights: the trained run's own files, over those of the base where there is one."""
    dtype = None if spec.dtype == "base" else spec.dtype
    if dtype == "source":
        dtype = naming.source_dtype(skeleton, manifest)
    if base is not None:
        assets.copy_base_assets(base, target, skeleton.can_generate())
    notes = assets.copy_assets(model_dir, target)
    return notes + assets.write_config(skeleton, dtype, target, base, spec.trust_remote_code)


def _check_space(target: Path, plan: MergePlan) -> None:
    free = shutil.disk_usage(target).free
    if plan.nbytes + _SPARE > free:
        raise MergeError(
            f"{target.parent}: not enough space: about {plan.nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are "
            "free. Nothing was written; free some space or choose another output directory."
        )


def _verify(spec: ExportSpec, target: Path, plan: MergePlan, contract: Contract) -> dict[str, Any]:
    checks: dict[str, Any] = {"structure": verify.check_structure(target, plan), "contract": contract.to_check()}
    options = spec.verify
    return checks | verify.check_loading(
        target,
        plan.nbytes,
        load=options.load,
        generate=options.generate,
        max_memory=options.max_memory,
        timeout_s=options.timeout_s,
        trust_remote_code=spec.trust_remote_code,
        external_lib=spec.external_lib,
    )


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    timings[name] = time.monotonic() - start


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    base_model: str | None = None,
    lora: str = "fused",
    workers: int | None = None,
    memory_budget: str = "1GiB",
    verify: bool = True,
    trust_remote_code: bool = False,
) -> ExportRecord:
    """Export one verl checkpoint (`global_step_N` or its `actor/`) to the new directory `output`.

    Blocks until it is there, verified, and returns what its `export.json` holds. Needs no
    verl and starts no Ray. Raises AutoExportError; then `output` does not exist.
    """
    spec = checkpoint_spec(
        Path(checkpoint), dtype=dtype, max_shard_size=max_shard_size, base_model=base_model, lora=lora,
        memory_budget=memory_budget, verify=verify, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return export_to_directory(spec, Path(output), LocalRunner(workers))


def checkpoint_spec(
    checkpoint: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    base_model: str | None = None,
    lora: str = "fused",
    memory_budget: str = "1GiB",
    verify: bool = True,
    trust_remote_code: bool = False,
) -> ExportSpec:
    """The spec of an export by hand; the step is read from the path. Raises ConfigError or SourceError."""
    if dtype not in ("bfloat16", "float16", "float32", "source", "base"):
        raise ConfigError(f"dtype {dtype!r}: expected bfloat16, float16, float32, source or base.")
    if lora != "fused":
        raise ConfigError(f"lora {lora!r}: not available in this release, which refuses LoRA checkpoints.")
    directory = find_checkpoint(checkpoint)
    return ExportSpec(
        checkpoint=directory,
        step=step_of(directory),
        dtype=dtype,
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
        memory_budget=parse_size(memory_budget, "memory_budget"),
        verify=VerifyConfig() if verify else VerifyConfig(load=False, generate=False),
        trust_remote_code=trust_remote_code,
        base_model=base_model,
        origin=str(directory.absolute()),
        triggers=(Trigger("command", "exported by hand"),),
    )


def step_of(directory: Path) -> int:
    """N of the nearest `global_step_N` in the path; 0 where there is none."""
    for part in reversed(directory.absolute().parts):
        prefix, _, number = part.rpartition("_")
        if prefix == "global_step" and number.isdigit():
            return int(number)
    return 0

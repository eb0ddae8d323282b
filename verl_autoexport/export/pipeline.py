"""The only place that orders the stages: gather, plan, merge, assets, verify, publish."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from verl_autoexport.errors import AutoExportError, ConfigError, MergeError, PlanError, SourceError, VerifyError
from verl_autoexport.export import assets, by_hand, places
from verl_autoexport.export.assets import Reference
from verl_autoexport.export.destinations import appears_whole
from verl_autoexport.export.record import make_record
from verl_autoexport.export.spec import ExportSpec, checkpoint_spec
from verl_autoexport.merge.job import MergeJob, WrittenFile
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.merge.plan import MergePlan
from verl_autoexport.merge.protocol import MergeRunner
from verl_autoexport.model.asset_facts import AssetLoader
from verl_autoexport.model.base_model import base_directory
from verl_autoexport.model.dtypes import model_dtype
from verl_autoexport.model.lora import adapter as lora
from verl_autoexport.model.lora import peft_config
from verl_autoexport.model.planner import ADAPTER_FOLDER, Planned, plan_model
from verl_autoexport.model.saved_config import settled
from verl_autoexport.model.transformers_api import untested
from verl_autoexport.registry.record import ExportRecord
from verl_autoexport.registry.shared_files import SharedFiles, find_shared, link_shared
from verl_autoexport.registry.store import Registry, Version
from verl_autoexport.shards.checksums import join
from verl_autoexport.shards.safetensors_files import INDEX_NAME
from verl_autoexport.sources.download_stubs import check_fetched
from verl_autoexport.sources.formats import format_of, open_source
from verl_autoexport.sources.protocol import ShardSource
from verl_autoexport.sources.saved_files import check_links
from verl_autoexport.system.page_cache import drop_cache
from verl_autoexport.system.untrusted import is_plain_name
from verl_autoexport.verify import checks as verify

RECORD_NAME = "export.json"
VERIFYING = "verifying"
"""The stage that has a time limit of its own."""
_SPARE = 64 << 20  # bytes of disk left free beyond the estimate


class Progress(Protocol):
    """An observer of the stages: the command line shows them, a training run ignores them."""

    def stage(self, name: str, total: int | None = None) -> None: ...

    def advance(self, nbytes: int) -> None: ...


class Silent:
    """The progress of an export that nobody watches."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


def export_to_registry(
    spec: ExportSpec, registry: Registry, runner: MergeRunner, progress: Progress | None = None
) -> Version:
    """Exports into `registry` as its next version; raises AutoExportError and leaves nothing visible.

    `progress` may raise until the stage `publishing`; nothing is published then.
    """
    progress = progress or Silent()
    staging = registry.stage(f"step{spec.step}")
    try:
        versions = registry.versions()
        spec = replace(spec, grouped=_kept_apart(versions))
        record = run_export(spec, staging.path, runner, progress, find_shared(versions))
        progress.stage("flushing to disk")
        return registry.publish(staging, record, partial(progress.stage, "publishing"))
    except BaseException:
        with suppress(AutoExportError):  # the first error is the one to report; `recover` removes the leftovers
            registry.discard(staging)
        raise


def export_to_directory(
    spec: ExportSpec, output: Path, runner: MergeRunner, progress: Progress | None = None
) -> ExportRecord:
    """Exports to a directory of its own, which appears whole or not at all.

    Raises ConfigError if `output` exists and is not an empty directory, or cannot be created.
    """
    places.check_output(output, spec.options.base_model)
    with appears_whole(output) as staging:
        record = run_export(spec, staging, runner, progress)
        (staging / RECORD_NAME).write_text(json.dumps(record.to_dict(), indent=2) + "\n", encoding="utf-8")
        return record


def run_export(
    spec: ExportSpec,
    target: Path,
    runner: MergeRunner,
    progress: Progress | None = None,
    shared: SharedFiles = MappingProxyType({}),
) -> ExportRecord:
    """Makes a complete, verified model directory in `target` (empty, on the output's file system).

    Before verification, each weight file that is among `shared` becomes a link to it.
    """
    progress = progress or Silent()
    progress.stage("reading shards")
    source = _open_source(spec)
    try:
        return _run(spec, source, target, runner, progress, shared)
    finally:
        if not spec.cached:
            source.drop_cache()
            for path in target.rglob("*.safetensors"):
                drop_cache(path)


def _run(
    spec: ExportSpec, source: ShardSource, target: Path, runner: MergeRunner, progress: Progress, shared: SharedFiles
) -> ExportRecord:
    timings = {"stall": spec.stall_s}
    if spec.hand_over_s is not None:
        timings["hand_over"] = spec.hand_over_s
    check_links(spec.checkpoint)
    with ExitStack() as stack:
        with _timed(timings, "gather"):
            manifest = source.manifest()
            saved, notes = stack.enter_context(settled(spec.options, spec.saved, manifest))
            planned = plan_model(
                spec.options, spec.checkpoint, saved, manifest, frozen=spec.frozen, grouped=spec.grouped
            )
            _check_adapter(spec, planned)
            _check_space(target, planned.plan)
        with _timed(timings, "merge"):
            progress.stage("merging", planned.plan.nbytes)
            written = runner.run(_jobs(spec, planned, target), progress.advance)
            progress.stage("comparing checksums")
            runs = join({*planned.read, *(run for file in written for run in file.read)})
            source.verify_checksums(manifest, runs, progress.advance)
            written = [replace(w, linked=link_shared(target / w.name, w.sha256, w.nbytes, shared)) for w in written]
            more, reference = _write_beside(spec, saved, planned, written, target)
            notes = [*untested(), *planned.manifest.notes, *planned.compatibility.notes, *notes, *more]
        with _timed(timings, "verify"):
            progress.stage(VERIFYING)
            checks = _verify(spec, saved, target, planned, reference)
            source.check_unchanged()
    names = (planned.skeleton.name,)
    return make_record(spec, source.kind, target, manifest, planned.plan, written, checks, timings, names, notes)


def _open_source(spec: ExportSpec) -> ShardSource:
    _check_fetched(spec)
    source = spec.source or open_source(spec.checkpoint)
    if spec.fingerprint in (None, source.fingerprint):
        return source
    raise SourceError(
        f"{spec.checkpoint}: the shards of step {spec.step} have changed since it was chosen: fingerprint "
        f"{spec.fingerprint} expected, {source.fingerprint} found. The step was saved again in between."
    )


def _check_fetched(spec: ExportSpec) -> None:
    folders = [spec.saved, *([Path(spec.options.base_model).expanduser()] if spec.options.base_model else [])]
    check_fetched([] if spec.source else format_of(spec.checkpoint).files(spec.checkpoint))
    check_fetched(path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()))


def _jobs(spec: ExportSpec, planned: Planned, target: Path) -> list[MergeJob]:
    jobs = []
    read_again = spec.options.verify.load is not False and planned.plan.nbytes <= spec.options.verify.max_memory
    for file in planned.plan.files:
        path = target / file.name
        path.parent.mkdir(exist_ok=True)
        needed = {fqn: planned.manifest.tensors[fqn] for fqn in file.sources}
        sums = dict.fromkeys(planned.manifest.records, ())  # a job needs only the names of the files with checksums
        manifest, cached = replace(planned.manifest, tensors=needed, records=sums), spec.cached or read_again
        jobs.append(MergeJob(file, manifest, path, spec.options.memory_budget, cached, read_again))
    return jobs


def _kept_apart(versions: Sequence[Version]) -> frozenset[str]:
    """Names on disk that the newest version keeps in files of their own, so that later versions can share them."""
    names: set[str] = set()
    for file in versions[-1].record.files if versions else ():
        if file.get("apart") and is_plain_name(file.get("name")):
            with suppress(VerifyError):  # damaged since, so there is nothing to share
                names |= verify.read_header(versions[-1].path / file["name"]).keys() - {"__metadata__"}
    return frozenset(names)


def _write_beside(
    spec: ExportSpec, saved: Path, planned: Planned, written: Sequence[WrittenFile], target: Path
) -> tuple[list[str], Reference]:
    """Writes everything but the weights; returns notes, and the reference that tokenizer and processor must equal."""
    options = spec.options
    skeleton, base, adapter = planned.skeleton, planned.compatibility.base, planned.adapter
    notes = []
    if planned.plan.index is not None:
        (target / INDEX_NAME).write_text(json.dumps(planned.plan.index, indent=2) + "\n", encoding="utf-8")
    if options.lora != "adapter":
        dtype = None if options.dtype == "base" else model_dtype(skeleton, planned.manifest, options.dtype)
        values = planned.compatibility.config_values
        notes += assets.write_config(skeleton, dtype, target, base, values)
        if base is None:
            notes.append(f"not compared with the base model: {planned.compatibility.reason}")
    base_files, loader = base_directory(options.base_model), AssetLoader(skeleton.trust_remote_code)
    more, reference = assets.write_assets(saved, base_files, target, loader, generates=skeleton.generates)
    notes += more
    if adapter is None:
        return notes, reference
    if options.lora != "fused":
        folder = target / ADAPTER_FOLDER if options.lora == "both" else target
        peft_config.write_config(adapter.config, options.base_model, folder)
    return notes + lora.check_written(adapter, written, options.lora, options.dtype), reference


def _check_adapter(spec: ExportSpec, planned: Planned) -> None:
    given = spec.options.lora_config
    if planned.adapter is None and spec.by_hand and given is not None:
        raise PlanError(f"--lora-config {given}: given, but {spec.checkpoint} holds no LoRA weights.")


def _check_space(target: Path, plan: MergePlan) -> None:
    free = shutil.disk_usage(target).free
    if plan.nbytes + _SPARE > free:
        raise MergeError(
            f"{target.parent}: not enough space: about {plan.nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are "
            "free. Nothing was written; free some space or choose another output directory."
        )


def _verify(spec: ExportSpec, saved: Path, target: Path, planned: Planned, reference: Reference) -> dict[str, Any]:
    """The checks as in `export.json`; raises VerifyError if one failed."""
    options = spec.options
    check = partial(
        verify.check_loading,
        load=options.verify.load,
        generate=options.verify.generate,
        max_memory=options.verify.max_memory,
        timeout_s=options.verify.timeout_s,
        trust_remote_code=options.trust_remote_code,
        external_lib=options.external_lib,
        carried=planned.compatibility.carried,
    )
    checks = {"structure": verify.check_structure(target, planned.plan)}
    nbytes, source, beside = planned.plan.nbytes, _source(spec, saved, planned), reference.to_json()
    if planned.adapter is not None and options.lora == "adapter":
        checks |= check(target, nbytes, adapter_of=saved, assets=beside)
    else:
        if planned.adapter is not None and options.lora == "both":
            adapter = check(target / ADAPTER_FOLDER, planned.plan.files[-1].nbytes, adapter_of=saved)["load"]
        else:
            adapter = None
        checks |= check(target, nbytes, source=source, assets=beside)
        checks |= {} if adapter is None else {"adapter": adapter}
    structure, *others = ((name, found.to_json()) for name, found in checks.items())
    return dict([structure, ("contract", planned.compatibility.to_check()), *others])


def _source(spec: ExportSpec, saved: Path, planned: Planned) -> verify.Source | None:
    if spec.source is not None:
        return None
    tensors = planned.manifest.tensors.values()
    nbytes = sum(t.nbytes for t in tensors)
    if planned.adapter is None:
        loaded = nbytes + sum(4 * math.prod(t.shape) for t in tensors)  # once as they are, once in float32
        return verify.Source(spec.checkpoint, saved, nbytes=loaded if planned.renamed else 0)
    base = None if planned.adapter.base else base_directory(spec.options.base_model)
    return verify.Source(spec.checkpoint, saved, planned.adapter.config, base, nbytes)


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
    max_shard_size: int | str = "5GB",
    base_model: str | None = None,
    lora: str = "fused",
    workers: int | None = None,
    memory_budget: int | str = "1GiB",
    verify: bool = True,
    trust_remote_code: bool = False,
    lora_config: str | os.PathLike[str] | None = None,
    base_check: str = "strict",
    carry_unread: bool = False,
) -> ExportRecord:
    """Exports one verl checkpoint (`global_step_N` or its `actor/`) to the new directory `output`.

    Blocks until the verified directory is there, and returns the content of its `export.json`. Needs no
    verl and starts no Ray. Raises AutoExportError; then `output` does not exist.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers!r}: expected a whole number from 1 on.")
    try:
        if lora_config is not None:
            by_hand.check_lora_config(Path(lora_config))
        spec = checkpoint_spec(
            Path(checkpoint), verify=verify, dtype=dtype, max_shard_size=max_shard_size, base_model=base_model,
            lora=lora, memory_budget=memory_budget, trust_remote_code=trust_remote_code,
            lora_config=None if lora_config is None else Path(lora_config), base_check=base_check,
            carry_unread=carry_unread,
        )  # fmt: skip
        return export_to_directory(spec, Path(output), LocalRunner(workers))
    except (OSError, ValueError) as e:  # paths that are too long, unreadable or invalid
        raise ConfigError(f"{checkpoint} cannot be exported to {output}: {e}") from e

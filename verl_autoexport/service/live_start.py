"""Starting the live source: which tensors the workers copy, in which dtype and order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from verl_autoexport.config.schema import AutoExportConfig, ExportOptions
from verl_autoexport.export.assets import model_files
from verl_autoexport.model.planner import capture_dtypes, plan_model, tied_shards
from verl_autoexport.service.request import RunInfo
from verl_autoexport.sources.live.coordinator import LiveSource, split_otherwise


def start_live(workers: Sequence[Any], settings: AutoExportConfig, info: RunInfo) -> LiveSource:
    """The live source of a run whose workers are up; raises PlanError or SourceError if it could export nothing."""
    source = LiveSource(workers, settings.role, settings.output_dir, settings.queue.inflight_bytes, model_files)
    weights = settings.weights
    options = ExportOptions(
        **{f.name: getattr(weights, f.name) for f in fields(weights)},
        base_model=info.base_model, trust_remote_code=info.trust_remote_code, external_lib=info.external_lib,
    )  # fmt: skip
    saved = source.directory / "huggingface"
    planned = plan_model(options, source.directory, saved, source.manifest(), frozen=info.frozen, values=False)
    groups: dict[str, int] = {}
    for number, file in enumerate(planned.plan.files):  # so that a merge task pulls blocks of its own file only
        groups |= dict.fromkeys(file.sources - groups.keys() - set(planned.compatibility.carried), number)
    tied = tied_shards(planned)
    for alias in split_otherwise(source.layouts, tied):  # the export then compares them
        groups[alias] = groups[tied[alias]]
    source.prepare(capture_dtypes(options, planned), groups, settings.queue.device_clone, tied)
    return source

"""The record of one export: the content of its `export.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from verl_autoexport.export.spec import ExportSpec
from verl_autoexport.merge.job import WrittenFile
from verl_autoexport.merge.plan import MergePlan
from verl_autoexport.registry.record import ExportRecord
from verl_autoexport.shards.manifest import ShardManifest
from verl_autoexport.system.installed import versions


def make_record(
    spec: ExportSpec,
    kind: str,
    target: Path,
    manifest: ShardManifest,
    plan: MergePlan,
    written: Sequence[WrittenFile],
    checks: Mapping[str, Any],
    timings: Mapping[str, float],
    architectures: tuple[str, ...],
    notes: Sequence[str],
) -> ExportRecord:
    """The record of the files in `target`, made from a source of `kind`; the registry sets `version`."""
    return ExportRecord(
        version=0,
        step=spec.step,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        run=dict(spec.run),
        triggers=tuple(t.to_dict() for t in spec.triggers),
        metrics=dict(spec.metrics),
        measured_on=spec.measured_on,
        source={
            "kind": kind,
            "path": spec.origin or (str(spec.checkpoint) if spec.source is None else None),
            "world_size": manifest.world_size,
            "backend": manifest.backend,
            "fingerprint": manifest.fingerprint,
        },
        base_model=spec.options.base_model,
        architectures=architectures,
        dtype=spec.options.dtype,
        num_parameters=plan.num_parameters,
        files=tuple(_file_entries(target, {w.name: w for w in written})),
        verification=dict(checks),
        timings_s={k: round(v, 4) for k, v in timings.items()},
        versions=versions("verl"),
        notes=tuple(notes),
    )


def _file_entries(target: Path, written: Mapping[str, WrittenFile]) -> Iterator[dict[str, Any]]:
    for path in sorted(p for p in target.rglob("*") if p.is_file()):
        name = path.relative_to(target).as_posix()
        if file := written.get(name):
            marks = {key: True for key in ("apart", "linked") if getattr(file, key)}
            yield {"name": name, "bytes": file.nbytes, "sha256": file.sha256, **marks}
        else:
            yield {"name": name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

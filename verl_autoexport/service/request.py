"""The data between a run's driver and the exporter: a request for one milestone, and its outcome."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_autoexport.config.schema import AutoExportConfig, ExportOptions
from verl_autoexport.export.spec import ExportSpec
from verl_autoexport.milestones.events import Decision, StepEvent, Trigger, is_measured, is_trigger
from verl_autoexport.milestones.triggers import measured_on
from verl_autoexport.sources.holds import Hold
from verl_autoexport.system.untrusted import is_count

if TYPE_CHECKING:
    from verl_autoexport.sources.live.snapshot import SnapshotHandle


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts of a run that each of its exports needs; `frozen` are the parameters that it does not train.

    `homes` are the nodes of the ranks if these keep checkpoints on disks of their own.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    lora_adapter: str | None = None
    trust_remote_code: bool = False
    external_lib: str | None = None
    frozen: tuple[str, ...] | None = None
    homes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunInfo(RunFacts):
    """The same, and the directory of the run's checkpoints."""

    checkpoints: Path


@dataclass(frozen=True)
class Outcome:
    """The end of a milestone. `status`: `published` (then `version` is its name), `failed` or `dropped`.

    `lost`: the exporter ended before it could note the outcome itself.
    """

    step: int
    status: str
    version: str | None = None
    reason: str = ""
    lost: bool = False


@dataclass(frozen=True)
class ExportRequest(RunFacts):
    """A milestone to export. `time` is the unix time of the decision, `stall_s` how long training waited for it.

    The weights are in `directory` or in `snapshot`. `hold` is the directory of the hold, which has links
    on several nodes if it is `spread`; `origin` is the path to record; `attempts` counts the failed tries.
    """

    step: int
    time: float
    triggers: tuple[Trigger, ...]
    directory: Path
    fingerprint: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    measured_on: str | None = None
    hold: Path | None = None
    spread: bool = False
    origin: str | None = None
    stall_s: float = 0.0
    attempts: int = 0
    snapshot: SnapshotHandle | None = None

    @property
    def droppable(self) -> bool:
        return all(trigger.droppable for trigger in self.triggers)

    @property
    def decision(self) -> Decision:
        return Decision(self.step, self.time, self.triggers)

    def to_json(self) -> dict[str, Any]:
        """The content of `pin.json` in a hold, which outlives the processes and so cannot keep a snapshot."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("hold", "snapshot")}
        return found | {
            "triggers": [trigger.to_dict() for trigger in self.triggers],
            "directory": str(self.directory),
            "pin": None if self.hold is None else str(self.hold),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], step: int) -> ExportRequest:
        """The request for `step` in `data`; raises ValueError if untrusted `data` is no such request."""
        _check(data, step)
        plain = {f.name for f in fields(cls)} - {"triggers", "directory", "hold", "frozen", "homes", "snapshot"}
        frozen = data.get("frozen")
        return cls(
            **{key: data[key] for key in plain & data.keys()},
            triggers=tuple(map(Trigger.from_dict, data["triggers"])),
            directory=Path(data["directory"]),
            hold=Path(data["pin"]),
            frozen=None if frozen is None else tuple(frozen),
            homes=tuple(data.get("homes") or ()),
        )


def make_request(
    info: RunInfo, decision: Decision, event: StepEvent, source: Hold | SnapshotHandle, stall_s: float
) -> ExportRequest:
    """The request for a milestone whose weights are in `source`; training waited `stall_s` seconds for it."""
    if isinstance(source, Hold):
        where: dict[str, Any] = {"hold": source.path, "spread": source.spread, "origin": source.origin}
    else:
        where = {"snapshot": source}
    return ExportRequest(
        step=decision.step,
        time=decision.time,
        triggers=decision.triggers,
        directory=source.directory,
        fingerprint=source.fingerprint,
        metrics={k: v if math.isfinite(v) else None for k, v in event.metrics.items()},
        measured_on=measured_on(decision.triggers),
        stall_s=round(stall_s, 6),
        **{f.name: getattr(info, f.name) for f in fields(RunFacts)},
        **where,
    )


def _check(request: Mapping[str, Any], step: int) -> None:
    texts = ("pin", "directory", "fingerprint")
    maybe = ("origin", "measured_on", "base_model", "lora_adapter", "external_lib")
    triggers, metrics = request.get("triggers"), request.get("metrics")
    names, homes = request.get("frozen"), request.get("homes") or ()
    sound = {
        "step": request.get("step") == step,
        "time": is_measured(request.get("time")),
        "stall_s": is_measured(request.get("stall_s")),
        "triggers": isinstance(triggers, list) and triggers and all(map(is_trigger, triggers)),
        "metrics": isinstance(metrics, dict) and all(v is None or is_measured(v) for v in metrics.values()),
        "run": isinstance(request.get("run"), dict),
        "trust_remote_code": isinstance(request.get("trust_remote_code"), bool),
        "spread": isinstance(request.get("spread", False), bool),
        "frozen": names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)),
        "homes": isinstance(homes, list | tuple) and all(isinstance(n, str) for n in homes),
        "attempts": is_count(request.get("attempts", 0)),
        "live": request.get("live") is None,  # a hold keeps no snapshot
    }
    sound |= {key: isinstance(request.get(key), str) for key in texts}
    sound |= {key: isinstance(request.get(key), str | None) for key in maybe}
    for key, good in sound.items():
        if not good:
            raise ValueError(f"{key}: not a value that a request can have: {request.get(key)!r:.80}")


def make_spec(request: ExportRequest, settings: AutoExportConfig) -> ExportSpec:
    """The export that a request asks for, under the run's settings."""
    weights = settings.weights
    return ExportSpec(
        checkpoint=request.directory,
        step=request.step,
        options=ExportOptions(
            **{f.name: getattr(weights, f.name) for f in fields(weights)},
            memory_budget=settings.merge.memory_budget,
            verify=settings.verify,
            trust_remote_code=request.trust_remote_code,
            external_lib=request.external_lib,
            base_model=request.base_model,
            lora_config=Path(request.lora_adapter) if request.lora_adapter else None,
        ),
        triggers=request.triggers,
        metrics=request.metrics,
        measured_on=request.measured_on,
        run=request.run,
        origin=request.origin,
        stall_s=request.stall_s,
        fingerprint=request.fingerprint,
        frozen=None if request.frozen is None else frozenset(request.frozen),
        cached=False,
    )

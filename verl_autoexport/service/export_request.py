"""What the driver asks the export actor for: JSON on its way (a hold holds it too), a spec at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from verl_autoexport.config.schema import AutoExportConfig, ExportOptions
from verl_autoexport.export.spec import ExportSpec
from verl_autoexport.milestones.events import Decision, StepEvent, Trigger, is_measured, is_trigger
from verl_autoexport.milestones.triggers import measured_on
from verl_autoexport.sources.holds import Hold
from verl_autoexport.system.untrusted import is_count


@dataclass(frozen=True)
class RunInfo:
    """What the driver needs to know of the run; `frozen` are the parameters that it does not train, where known.

    `homes` are the nodes of the ranks, where they keep checkpoints on disks of their own.
    """

    checkpoints: Path
    run: Mapping[str, Any]
    base_model: str | None = None
    lora_adapter: str | None = None
    trust_remote_code: bool = False
    external_lib: str | None = None
    frozen: tuple[str, ...] | None = None
    homes: tuple[str, ...] = ()


def make_request(
    info: RunInfo, decision: Decision, event: StepEvent, hold: Hold | None, stall_s: float
) -> dict[str, Any]:
    """A milestone of the run; `stall_s` is what training waited for it."""
    return {
        "step": decision.step,
        "time": decision.time,
        "triggers": [t.to_dict() for t in decision.triggers],
        "metrics": {k: v if math.isfinite(v) else None for k, v in event.metrics.items()},
        "measured_on": measured_on(decision.triggers),
        "pin": hold and str(hold.path),
        "spread": hold is not None and hold.spread,
        "directory": hold and str(hold.directory),
        "origin": hold and hold.origin,
        "fingerprint": hold and hold.fingerprint,
        "stall_s": round(stall_s, 6),
        "run": dict(info.run),
        "base_model": info.base_model,
        "lora_adapter": info.lora_adapter,
        "trust_remote_code": info.trust_remote_code,
        "external_lib": info.external_lib,
        "frozen": info.frozen,
        "homes": info.homes,
    }


def check_request(request: Mapping[str, Any], step: int) -> None:
    """Raises ValueError unless what a hold holds is a request for `step`, as `make_request` makes it."""
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
        "live": request.get("live") is None,  # a hold holds no snapshot
    }
    sound |= {key: isinstance(request.get(key), str) for key in texts}
    sound |= {key: isinstance(request.get(key), str | None) for key in maybe}
    for key, good in sound.items():
        if not good:
            raise ValueError(f"{key}: not what a request holds: {request.get(key)!r:.80}")


def make_spec(request: Mapping[str, Any], settings: AutoExportConfig) -> ExportSpec:
    """The export that a request asks for, under the run's settings."""
    adapter, names, weights = request.get("lora_adapter"), request.get("frozen"), settings.weights
    return ExportSpec(
        checkpoint=Path(request["directory"]),
        step=request["step"],
        options=ExportOptions(
            **{f.name: getattr(weights, f.name) for f in fields(weights)},
            memory_budget=settings.merge.memory_budget,
            verify=settings.verify,
            trust_remote_code=request["trust_remote_code"],
            external_lib=request["external_lib"],
            base_model=request["base_model"],
            lora_config=Path(adapter) if adapter else None,
        ),
        triggers=tuple(map(Trigger.from_dict, request["triggers"])),
        metrics=request["metrics"],
        measured_on=request["measured_on"],
        run=request["run"],
        origin=request["origin"],
        stall_s=request["stall_s"],
        fingerprint=request["fingerprint"],
        frozen=None if names is None else frozenset(names),
        cached=False,
    )

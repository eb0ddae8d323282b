"""The request for an export, as it is kept in a hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_autoexport.milestones.events import Decision, StepEvent, Trigger
from verl_autoexport.service.request import ExportRequest, RunInfo, make_request
from verl_autoexport.sources.holds import Hold


def test_requests_in_holds_are_checked():
    decision = Decision(1, 1.0, (Trigger("at_steps", "why"),))
    hold = Hold(Path("/h"), 1, "/o", "f", linked=True)
    info = RunInfo(Path("/r"), run={}, frozen=("a",), homes=("n",))
    made = make_request(info, decision, StepEvent(1, {"a": 1.0}, 1.0), hold, 0.5)
    good = json.loads(json.dumps(made.to_json()))
    assert ExportRequest.from_json(good, 1) == made
    for key, wrong in (
        ("time", 10**400), ("triggers", [None]), ("triggers", [{"policy": "x", "name": []}]), ("triggers", {}),
        ("metrics", {"a": "x"}), ("step", "1"), ("step", 9), ("run", []), ("fingerprint", {}), ("stall_s", None),
        ("frozen", 3), ("homes", [1]), ("base_model", 7), ("spread", "no"), ("live", {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{key}: not a value that a request can have"):
            ExportRequest.from_json(good | {key: wrong}, 1)

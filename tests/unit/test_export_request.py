"""The request for an export, as it is kept in a hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_autoexport.milestones.events import Decision, StepEvent, Trigger
from verl_autoexport.service.export_request import RunInfo, check_request, make_request


def test_requests_in_holds_are_checked():
    good = make_request(
        RunInfo(Path("/r"), run={}),
        Decision(1, 1.0, (Trigger("at_steps", "why"),)),
        StepEvent(1, {"a": 1.0}, 1.0),
        None,
        0.5,
    )
    good |= {"pin": "/p", "directory": "/p", "fingerprint": "f"}
    check_request(json.loads(json.dumps(good)), 1)
    for key, wrong in (
        ("time", 10**400), ("triggers", [None]), ("triggers", [{"policy": "x", "name": []}]), ("triggers", {}),
        ("metrics", {"a": "x"}), ("step", "1"), ("step", 9), ("run", []), ("fingerprint", {}), ("stall_s", None),
        ("frozen", 3), ("homes", [1]), ("base_model", 7), ("spread", "no"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{key}: not what a request holds"):
            check_request(good | {key: wrong}, 1)

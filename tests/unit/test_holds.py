"""What a hold records outlives the machine."""

from __future__ import annotations

import os

from verl_autoexport.sources import holds
from verl_autoexport.sources.holds import Hold


def test_a_request_in_a_hold_is_on_disk_before_choose_returns(tmp_path, monkeypatch):
    hold = Hold(tmp_path / ".autoexport/step_2-12345678", 2, str(tmp_path / "global_step_2"), "f", linked=True)
    hold.path.mkdir(parents=True)
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append(f"-> {b}"), replace(a, b))[1])
    holds.choose(hold, {"step": 2})
    written, renamed, *folders = happened
    assert written == str(hold.path / ".pin.json.tmp")
    assert renamed == f"-> {hold.path / 'pin.json'}"
    assert folders == [str(hold.path), str(hold.path.parent)], "the names, too"
    (found,) = holds.find_holds(tmp_path)
    assert found.request == {"step": 2}

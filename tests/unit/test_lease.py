"""The record of the run that exports into an output directory, within one process."""

from __future__ import annotations

import json

import pytest

from tests.support.registry import locked, publish
from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import lease
from verl_autoexport.registry.lock import flaw_of
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry


def test_a_process_takes_its_own_lease_again(registry, root):
    first = registry.own("p/first")
    again = Registry(root).own("p/first")
    assert lease.read(root).token == again.token
    first.release()
    assert lease.read(root).token == again.token, "only its own is given up"
    again.release()
    assert lease.read(root) is None


def test_who_was_taken_for_dead_publishes_nothing_more(registry, root):
    mine = Registry(root)
    mine.own("p/first")
    staged = mine.stage("x")
    record = json.loads((root / lease.NAME).read_text())
    (root / lease.NAME).write_text(json.dumps(record | {"token": "other", "run": "p/second"}))
    for change in (
        lambda: publish(mine, 2),
        lambda: mine.journal("failed", step=2),
        lambda: mine.prune(Keep(last=1)),
        lambda: mine.supersede_after(0),
        mine.recover,
        mine.check_owner,
    ):
        with pytest.raises(RegistryError, match="taken over by p/second"):
            change()
    mine.discard(staged)
    assert registry.versions() == []
    assert publish(registry, 2).number == 1, "whoever writes by hand owns nothing and is not refused"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"pid": "x"}'])
def test_a_damaged_record_stops_nobody(damage, registry, root):
    (root / lease.NAME).write_text(damage)
    registry.own("p/first")
    assert lease.read(root).run == "p/first"


def test_locks_that_work_are_told_from_those_that_do_not(tmp_path):
    assert flaw_of(tmp_path / ".lock") is None
    with locked(tmp_path):
        assert flaw_of(tmp_path / ".lock") is None, "somebody else has it"

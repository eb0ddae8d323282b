"""Calls that may hang are given up, and what was given up goes no further."""

from __future__ import annotations

import threading
import time

import pytest

from verl_autoexport.system.deadlines import Bounded, GivenUp, Watch


def test_a_call_is_given_up_and_the_next_works_once_it_has_ended():
    calls, answer = Bounded(), threading.Event()
    with pytest.raises(GivenUp, match=r"listing: given up after 0\.05 s"):
        calls.run(0.05, "listing", answer.wait)
    began = time.monotonic()
    with pytest.raises(GivenUp, match="reading: left out, because listing still hangs"):
        calls.run(5, "reading", lambda: 1)
    assert time.monotonic() - began < 1, "it is not waited for again"
    answer.set()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert calls.run(5, "reading", lambda: 1) == 1
            return
        except GivenUp:
            time.sleep(0.01)
    raise AssertionError("it never worked again")


def test_an_error_of_the_call_is_raised_as_it_is():
    with pytest.raises(TimeoutError, match="mine"):
        Bounded().run(5, "x", lambda: (_ for _ in ()).throw(TimeoutError("mine")))


def test_what_may_not_be_left_behind_is_waited_for_and_not_begun_once_given_up():
    calls, done = Bounded(), []

    def copies() -> str:
        with calls.uncounted():
            time.sleep(1)
        time.sleep(0.2)
        return "copied"

    assert calls.run(0.6, "x", copies) == "copied", "only what is not uncounted counts"

    def late() -> None:
        time.sleep(0.3)
        try:
            with calls.uncounted():
                done.append("copied weights of a later step")
        except GivenUp:
            done.append("refused")

    with pytest.raises(GivenUp):
        calls.run(0.05, "x", late)
    time.sleep(0.5)
    assert done == ["refused"]


def test_an_export_that_was_given_up_gets_to_no_other_stage():
    watch = Watch()
    watch.stage("merging")
    watch.advance(0)
    idle = watch.idle_s()
    watch.give_up()
    for report in (lambda: watch.stage("publishing"), lambda: watch.advance(1)):
        with pytest.raises(GivenUp, match="merging"):
            report()
    assert watch.idle_s() >= idle

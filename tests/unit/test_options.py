"""Options are spelled once, in the schema: the API, the command line and the spec of an export follow from it."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields

from verl_autoexport import export_checkpoint
from verl_autoexport.cli.arguments import export_options
from verl_autoexport.config.reading import read_options
from verl_autoexport.config.schema import ExportOptions
from verl_autoexport.system import cpus, page_cache


def test_the_api_takes_the_options_of_the_schema_with_their_defaults():
    taken = inspect.signature(export_checkpoint).parameters
    expected = {f.name: f for f in fields(ExportOptions)}
    assert taken.keys() - expected.keys() == {"checkpoint", "output", "workers"}
    assert expected.keys() - taken.keys() == {"external_lib"}, "a run's own"
    plain = {"5GB": 5 * 10**9, "1GiB": 1 << 30}
    for name, parameter in taken.items():
        if name in expected and name != "verify":  # which is a flag there
            default = plain.get(parameter.default, parameter.default)
            assert default == expected[name].default, f"{name}: another default than in the schema"


def test_a_text_given_by_hand_is_taken_as_it_is(monkeypatch):
    """OmegaConf would put the value of a variable in its place, or refuse what is no interpolation."""
    monkeypatch.setenv("HOME", "/nobody")
    for text in ("${oc.env:HOME}", "/a/${b", "a\\${b}"):
        assert read_options(base_model=text).base_model == text


def test_the_command_line_has_all_of_them_but_those_of_a_run():
    assert {f.name for f in fields(ExportOptions)} - export_options().keys() == {"external_lib", "verify"}


def test_reading_needs_no_call_that_only_linux_has(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "posix_fadvise")
    assert cpus.cores() >= 1
    (tmp_path / "file").write_bytes(b"x")
    page_cache.drop_cache(tmp_path / "file")

"""What README.md and docs/ say, as far as it can be compared with the code."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from tests.support.repository import ROOT as REPOSITORY
from tests.support.rooms import PACKAGE, ROOMS
from verl_autoexport.cli.main import _parser
from verl_autoexport.config.schema import ROOT, AutoExportConfig

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
MAX_LINES, MAX_WORDS = 150, 1500  # of the README: a newcomer's page
COMMAND = "verl-autoexport"
VALUES = {"N": "3", "SIZE": "5GB", "A": "auto"}
"""What stands for a placeholder whose value is checked; any other word is a good path or text."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_configuration_page_is_what_its_generator_writes() -> None:
    generator = runpy.run_path(str(DOCS / "make_configuration.py"))
    written = (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines()
    lines = itertools.zip_longest(generator["page"]().splitlines(), written)
    wanted, found = next(((a, b) for a, b in lines if a != b), (None, None))
    assert wanted == found, f"docs/configuration.md is old, run `make docs`: expected {wanted!r}, found {found!r}"


def test_the_table_of_releases_is_what_the_matrix_of_runs_found() -> None:
    generator = runpy.run_path(str(DOCS / "make_support.py"))
    written = (DOCS / "trainers.md").read_text(encoding="utf-8")
    assert generator["page"]() == written, "the table in docs/trainers.md is old: run `make docs`"


def test_the_readme_stays_a_newcomers_page() -> None:
    text = README.read_text(encoding="utf-8")
    lines, words = len(text.splitlines()), len(text.split())
    assert lines <= MAX_LINES, f"README.md has {lines} lines, at most {MAX_LINES}: move something into docs/"
    assert words <= MAX_WORDS, f"README.md has {words} words, at most {MAX_WORDS}: move something into docs/"


# -- links ---------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


def headings(page: Path) -> set[str]:
    """Their anchors, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in found}


@each_page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    lost = []
    for link in (found for found in links(page) if "://" not in found):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file():
            lost.append(f"{link}: no such file")
        elif anchor and anchor not in headings(target):
            lost.append(f"{link}: {target.name} has no such heading")
    assert not lost, f"{page.name}: {'; '.join(lost)}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    lost = [page.name for page in DOCS.glob("*.md") if page.resolve() not in linked]
    assert not lost, f"README.md leads to none of {lost}"


# -- commands and keys ---------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """Every command line of ours, in a block or between backticks; a shell's comments and substitutions left out."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ").partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    yield from (line for line in (*lines, *spans) if line.startswith(f"{COMMAND} "))


def arguments(command: str) -> list[str]:
    """Those of `verl-autoexport …`, what is optional included and placeholders replaced."""
    words = re.sub(r"[][]", "", command).split()[1:]
    return [VALUES.get(word, word) for word in words if word not in ("OPTIONS", "…")]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@each_page
def test_every_command_line_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for command in commands(page):
        given = arguments(command)
        if len(given) == 1 and given[0] in subcommands():
            continue  # a mention of the command, not a line to type
        try:
            _parser().parse_args(given)
        except SystemExit:
            wrong.append(f"{command}: {capsys.readouterr().err.strip()}")
    assert not wrong, f"{page.name}: {'; '.join(wrong)}"


def test_every_option_of_the_command_line_is_described() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    options = {option for parser in subcommands().values() for a in parser._actions for option in a.option_strings}
    lost = sorted(o for o in options - {"-h", "--help"} if not re.search(rf"{o}(?![\w-])", text))
    assert not lost, f"docs/cli.md does not describe {lost}"


def keys(cls: type = AutoExportConfig, prefix: str = ROOT) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield f"{prefix}.{name}"
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from keys(part, f"{prefix}.{name}")


@each_page
def test_every_key_exists(page: Path) -> None:
    named = re.findall(rf"(?<![\w./]){ROOT}\.([a-z_]+(?:\.[a-z_]+)*)", page.read_text(encoding="utf-8"))
    wrong = sorted({f"{ROOT}.{key}" for key in named} - set(keys()))
    assert not wrong, f"{page.name} names keys that do not exist: {wrong}"


# -- modules and rooms -----------------------------------------------------------------------


@each_page
def test_every_module_exists(page: Path) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?)`", page.read_text(encoding="utf-8"))
    known = {f"{room}/" for room in ROOMS} | {"tests/", "docs/", "configs/", "examples/", "hydra_plugins/"}
    named = [path for path in named if f"{path.partition('/')[0]}/" in known]
    lost = sorted(p for p in {*named} if not any((root / p).exists() for root in (REPOSITORY, REPOSITORY / PACKAGE)))
    assert not lost, f"{page.name} names what is not there: {lost}"


def test_the_architecture_page_has_the_rooms_and_what_they_may_import() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.+?) \|$", text, re.MULTILINE)
    described = {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}
    rooms = {r: set(allowed) - {"__init__"} for r, allowed in ROOMS.items() if r not in ("__init__", "__main__")}
    del rooms["hydra_plugins"]
    wrong = sorted(r for r in rooms.keys() | described.keys() if rooms.get(r) != described.get(r))
    assert not wrong, f"docs/architecture.md and the table ROOMS of tests/support/rooms.py differ in {wrong}"

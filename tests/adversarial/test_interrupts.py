"""Signals at every moment of the command line, standard streams in any state, and a locale that knows ASCII only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.checkpoints import CHECKED
from verl_autoexport.registry.store import Registry

COMMAND = [sys.executable, "-m", "verl_autoexport"]
INTERRUPTED = "verl-autoexport: interrupted; nothing half-made is left\n"


def start(*args: Any, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *map(str, args)], stdout=-1, stderr=-1, encoding="utf-8", **options)


def wait_for(moment: Callable[[], Any], process: subprocess.Popen[str], limit_s: float = 120) -> Any:
    """What `moment` gives as soon as that is something."""
    end = time.monotonic() + limit_s
    while not (found := moment()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.002)
    return found


def handles_signals(pid: int) -> bool:
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def children(pid: int, name: str) -> list[psutil.Process]:
    """Once one of them runs `name`."""
    found = psutil.Process(pid).children(recursive=True)
    with suppress(psutil.NoSuchProcess):
        return found if any(name in " ".join(child.cmdline()) for child in found) else []
    return []


MOMENTS: dict[str, Callable[[int, Path], Any]] = {
    "first": lambda pid, folder: handles_signals(pid),
    "imports": lambda pid, folder: "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"),
    "staging": lambda pid, folder: [*folder.glob(".out.*.tmp"), *folder.glob("out/.staging/*/")],
    "load": lambda pid, folder: children(pid, "load_in_child"),
}


@pytest.mark.parametrize(
    ("moment", "number", "where"),
    [
        ("first", signal.SIGINT, "--output"),
        ("first", signal.SIGTERM, "--registry"),
        ("imports", signal.SIGINT, "--output"),
        ("staging", signal.SIGTERM, "--output"),
        ("staging", signal.SIGTERM, "--registry"),
        ("load", signal.SIGHUP, "--output"),
        ("load", signal.SIGTERM, "--registry"),
    ],
)
def test_a_signal_ends_an_export_and_leaves_nothing(moment, number, where, source, tmp_path):
    process = start("export", source, where, tmp_path / "out")
    wait_for(lambda: MOMENTS[moment](process.pid, tmp_path), process)
    beside = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    if number == signal.SIGTERM:  # `timeout` sends it twice
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, "", INTERRUPTED)
    assert psutil.wait_procs(beside, timeout=30)[1] == []
    left = [
        p for p in tmp_path.rglob("*") if p.name not in (".staging", ".requests", ".trash", ".lock", "registry.json")
    ]
    assert [p for p in left if p != tmp_path / "out" or where == "--output"] == []


def test_what_a_killed_export_left_goes_with_the_next(source, tmp_path):
    killed = start("export", source, "--output", tmp_path / "out", "--no-verify")
    (left,) = wait_for(lambda: list(tmp_path.glob(".out.*.tmp")), killed)
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    (other := tmp_path / ".out2.0123abcd.tmp").mkdir()  # of another output
    first = start("export", source, "--output", tmp_path / "out", "--no-verify")
    (own,) = wait_for(lambda: [p for p in tmp_path.glob(".out.*.tmp") if p != left], first)
    first.send_signal(signal.SIGSTOP)
    assert not left.exists()
    try:
        second = start("export", source, "--output", tmp_path / "out", "--no-verify")
        assert second.communicate() == (f"{tmp_path / 'out'}\n", "")
        assert own.is_dir(), "a living export's directory stays"
    finally:
        first.send_signal(signal.SIGCONT)
    out, err = first.communicate()
    assert (first.returncode, out) == (1, "")
    assert re.fullmatch(r"verl-autoexport: --output \S+/out: cannot be put there: Directory not empty\.\n", err)
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "out"]


# -- standard streams -------------------------------------------------------------------------


def shell(script: str, *args: Any, code: int) -> subprocess.CompletedProcess[str]:
    """`"$@"` in the script is the command."""
    command = ["bash", "-c", script, "bash", *COMMAND, *map(str, args)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def listed(source, tmp_path_factory) -> Path:
    """A registry to list."""
    root = tmp_path_factory.mktemp("streams") / "exports"
    done = shell('exec "$@" 0<&- 1>&- 2>&-', "export", source, "--registry", root, code=1)  # as stdout is closed
    assert (done.stdout, done.stderr) == ("", "")
    (version,) = Registry(root).versions()
    assert {k: v["status"] for k, v in version.record.verification.items()} == CHECKED
    return root


def test_stdout_that_cannot_be_written_to(source, listed, tmp_path):
    closed, full = {">&-": "it is closed"}, {">/dev/full": "No space left on device"}
    for n, (stream, why) in enumerate((closed | full | {"</dev/null >&0": "Bad file descriptor"}).items()):
        told = f"verl-autoexport: standard output: cannot be written to: {why}\n"
        assert shell(f'"$@" {stream}', "ls", listed, code=1).stderr == told
        if n == 1:
            export = ("export", source, "--output", tmp_path / str(n), "--no-verify")
            assert shell(f'"$@" {stream}', *export, code=1).stderr == told
            assert (tmp_path / f"{n}/export.json").is_file()
    assert shell('"$@" >&-', "ls", tmp_path, code=1).stderr.count("\n") == 1, "one line, of what went wrong first"
    piped = shell('"$@" | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}', "show", listed, "1", "--json", code=0)
    broken = shell('exec 3> >(exec true); sleep 0.5; "$@" >&3', "show", listed, "1", "--json", code=1)
    assert piped.stderr == broken.stderr == ""


def test_stderr_that_cannot_be_written_to(source, listed, tmp_path):
    for n, stream in enumerate(("2>&-", "2>/dev/full", "2>&- <&-")):
        export = ("export", source, "--output", tmp_path / str(n), "--no-verify")
        if n < 2:
            assert shell(f'"$@" {stream}', *export, code=0).stdout == f"{tmp_path / str(n)}\n"
        assert shell(f'"$@" {stream}', "ls", tmp_path, code=1).stdout == "", "what goes wrong is not told on stdout"
        assert shell(f'"$@" {stream}', "ls", code=2).stdout == ""


# -- a locale that knows ASCII only -----------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def plain(*args: Any, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *(a if isinstance(a, bytes) else str(a) for a in args)]
    done = subprocess.run(command, capture_output=True, env=os.environ | ASCII)
    assert done.returncode == code, done.stderr
    assert done.stdout.isascii()
    assert done.stderr.isascii()
    return done


def test_names_that_are_not_ascii(source, tmp_path):
    step = shutil.copytree(source, tmp_path / "Prüfung/global_step_2", ignore=shutil.ignore_patterns("reference"))
    config = step / "actor/huggingface/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": "schön"}, ensure_ascii=False), "utf-8")
    base = shutil.copytree(step / "actor/huggingface", tmp_path / "Grundmodell é")
    root = tmp_path / "Läufe 模型"
    done = plain("export", step, "--registry", root)
    assert done.stdout == f"{root / 'v0001-step2'}\n".encode("ascii", "backslashreplace")
    (version,) = Registry(root).versions()
    assert version.record.source["path"] == str(step / "actor")
    assert version.record.verification["logits"]["status"] == "passed"
    assert json.loads((version.path / "config.json").read_text("utf-8"))["note"] == "schön"
    plain("request", root, "--note", "für später")
    (request,) = Registry(root).pending_requests()
    assert json.loads(request.read_text("utf-8"))["note"] == "für später"
    assert rb"Pr\xfcfung" in plain("show", root, "1").stdout
    assert rb"L\xe4ufe" in plain("ls", root, "--json").stdout or json.loads(plain("ls", root, "--json").stdout)
    assert b"Grundmodell" in plain("export", step, "--output", tmp_path / "o", "--base-model", base, code=1).stderr
    assert rb"n\xefrgends" in plain("ls", tmp_path / "nïrgends", code=1).stderr
    assert rb"\udcff" in plain("ls", os.fsencode(tmp_path) + b"/\xff", code=1).stderr
    assert b"expected a whole number" in plain("prune", root, "--last", "三", code=2).stderr

"""The command line, as a user starts it: `python -m verl_autoexport …` in processes of its own."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.checkpoints import CHECKED, STEP
from tests.support.registry import best, publish
from verl_autoexport import __version__
from verl_autoexport.registry.retention import Keep
from verl_autoexport.registry.store import Registry

COMMAND = [sys.executable, "-m", "verl_autoexport"]
NAME = f"v0001-step{STEP}"


def cli(*args: Any, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, **options)
    assert done.returncode == code, done.stderr
    return done


def refused(*args: Any) -> str:
    """The one line on stderr of a command that fails."""
    done = cli(*args, code=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("verl-autoexport: ")
    return line


def python(code: str, *args: Any) -> Any:
    """What `code` prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def published(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one version; only to be read."""
    root = tmp_path_factory.mktemp("registry") / "exports"
    done = cli("export", checkpoint("tied"), "--registry", root, "--no-verify")
    assert done.stdout == f"{root / NAME}\n"
    assert done.stderr == ""
    return root


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(published, tmp_path / "exports", symlinks=True)


# -- export ---------------------------------------------------------------------------------


def test_export_to_a_directory(checkpoint, tmp_path):
    base = tmp_path.parent / f"{tmp_path.name}-base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").touch()
    options = ["--dtype", "float16", "--max-shard-size", "40KB", "--base-model", base, "--no-verify"]
    options += ["--workers", 1, "--memory-budget", "1MiB"]
    done = cli("export", checkpoint("moe"), "--output", tmp_path / "out", *options)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'out'}\n", "")
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert (record["dtype"], record["base_model"], record["step"]) == ("float16", str(base), STEP)
    assert record["verification"]["load"]["status"] == "skipped"
    assert record["verification"]["contract"]["status"] == "skipped"
    assert "no model.safetensors" in record["verification"]["contract"]["detail"]
    assert len(list(tmp_path.glob("out/model-*-of-*.safetensors"))) > 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    line = refused("export", checkpoint("moe"), "--output", tmp_path / "out")
    assert str(tmp_path / "out") in line
    assert "exists and is not empty" in line

    line = refused("export", checkpoint("moe"), "--output", tmp_path / "none", "--dtype", "base")
    assert "dtype base" in line
    assert "--base-model" in line
    assert not (tmp_path / "none").exists()
    assert json.loads((tmp_path / "out/export.json").read_text()) == record


def test_export_twice_to_a_registry(checkpoint, root):
    again = cli("export", checkpoint("tied") / "actor", "--registry", root)
    assert again.stdout.startswith(f"step {STEP} is published already as {root / NAME}")
    assert [v.name for v in Registry(root).versions()] == [NAME]
    forced = cli("export", checkpoint("tied"), "--registry", root, "--again")
    assert forced.stdout == f"{root / f'v0002-step{STEP}'}\n"
    versions = Registry(root).versions()
    assert [v.name for v in versions] == [NAME, f"v0002-step{STEP}"]
    assert {k: v["status"] for k, v in versions[1].record.verification.items()} == CHECKED
    assert os.readlink(root / "latest") == f"v0002-step{STEP}"
    assert list((root / ".staging").iterdir()) == []


def test_export_that_fails(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    (made / "actor/model_world_size_2_rank_1.pt").unlink()
    assert "the files of rank 1 are missing" in refused("export", made, "--registry", tmp_path / "exports")
    assert "the files of rank 1 are missing" in refused("export", made, "--output", tmp_path / "out")
    assert Registry(tmp_path / "exports").versions() == []
    assert list((tmp_path / "exports/.staging").iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "COMMAND"),
        (["export"], "CHECKPOINT"),
        (["export", "x"], "--output --registry is required"),
        (["export", "x", "--output", "a", "--registry", "b"], "not allowed with"),
        (["export", "x", "--output", "a", "--dtype", "int8"], "int8"),
        (["show", "x"], "VERSION"),
        (["prune", "x", "--last", "0"], "--last: expected a whole number from 1 on, found '0'"),
        (["prune", "x", "--best", "many"], "--best: expected a whole number from 1 on, found 'many'"),
        (["prune", "x", "--max-bytes", "5XB"], "--max-bytes: expected a size such as 5GB"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_usage(args, words):
    done = cli(*args, code=2)
    assert done.stdout == ""
    assert words in done.stderr


def test_version_and_help():
    assert cli("--version").stdout == f"verl-autoexport {__version__}\n"
    assert "export one verl checkpoint" in cli("--help").stdout


# -- what is loaded -------------------------------------------------------------------------

IMPORTED = """
import json, sys
from verl_autoexport.cli.main import main
assert main(sys.argv[2:]) == 0
print(json.dumps([name for name in sys.argv[1].split(",") if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "command",
    [["ls"], ["ls", "--json"], ["show", "latest"], ["request"], ["pin", "1"], ["prune", "--max-bytes", "9GB"]],
)
def test_commands_that_load_nothing_heavy(command, root):
    assert python(IMPORTED, "torch,ray,transformers,verl,numpy", command[0], root, *command[1:]) == []


def test_export_starts_no_ray(checkpoint, tmp_path):
    command = ["export", checkpoint("tied"), "--output", tmp_path / "out", "--no-verify"]
    assert python(IMPORTED, "ray,verl,torch", *command) == ["torch"]


# -- the progress bar -----------------------------------------------------------------------


def test_progress_only_on_a_terminal(checkpoint, tmp_path):
    def export(name: str, stderr: int) -> bytes:
        command = [*COMMAND, "export", checkpoint("tied"), "--output", tmp_path / name, "--no-verify"]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, check=True).stdout

    ours, theirs = pty.openpty()
    assert export("terminal", theirs).decode() == f"{tmp_path / 'terminal'}\n"
    os.close(theirs)
    shown = read_all(ours).decode()
    for words in ("reading shards", "merging:", "%|", "B/s", "verifying"):
        assert words in shown
    with (tmp_path / "stderr").open("wb") as f:
        export("file", f.fileno())
    assert (tmp_path / "stderr").read_bytes() == b""


def read_all(fd: int) -> bytes:
    data = b""
    try:
        while block := os.read(fd, 1 << 16):
            data += block
    except OSError:  # EIO: how a terminal that nobody holds any more says that this is all
        pass
    os.close(fd)
    return data


# -- looking --------------------------------------------------------------------------------


def test_ls(root):
    head, row = cli("ls", root).stdout.splitlines()
    assert head.split() == ["VERSION", "STEP", "CREATED", "WHY", "VERIFIED", "POINTERS"]
    assert row.split()[:2] == [NAME, str(STEP)]
    assert row.split()[3:] == ["command", "structure", "latest"]
    (root / "v0009-step9").mkdir()
    Registry(root).journal("asked", step=8, triggers=[])
    Registry(root).journal("failed", step=10, reason="disk full", triggers=[])
    listed = cli("ls", root).stdout
    assert "v0009-step9: not a version" in listed
    assert "step 8: asked for, not finished" in listed
    assert "step 10 failed: disk full" in listed
    data = json.loads(cli("ls", root, "--json").stdout)
    (version,) = data["versions"]
    assert (version["version"], version["step"], version["path"]) == (NAME, STEP, str(root / NAME))
    assert (version["pointers"], version["pinned"], version["superseded"]) == (["latest"], False, False)
    assert data["pending"] == [8]
    assert [o["reason"] for o in data["not_exported"]] == ["disk full"]


def test_ls_of_an_empty_registry(tmp_path):
    Registry.create(tmp_path)
    assert cli("ls", tmp_path).stdout.split() == ["VERSION", "STEP", "CREATED", "WHY", "VERIFIED", "POINTERS"]
    assert json.loads(cli("ls", tmp_path, "--json").stdout) == {"versions": [], "pending": [], "not_exported": []}


def test_show(root):
    shown = cli("show", root, "latest").stdout
    for words in (str(root / NAME), "Qwen2ForCausalLM", "bfloat16", "exported by hand", "no tokenizer"):
        assert words in shown
    record = json.loads(cli("show", root, "1", "--json").stdout)
    assert record == json.loads((root / NAME / "export.json").read_text())


def test_request(root):
    assert ".requests" in cli("request", root, "--note", "before the holidays").stdout
    (path,) = Registry(root).pending_requests()
    assert json.loads(path.read_text())["note"] == "before the holidays"


def test_pin_and_unpin(root):
    assert cli("pin", root, "latest").stdout == f"{NAME}: pinned\n"
    assert Registry(root).find("1").pinned
    assert "pinned" in cli("ls", root).stdout
    assert cli("unpin", root, NAME).stdout == f"{NAME}: unpinned\n"
    assert not Registry(root).find("1").pinned


@pytest.mark.parametrize(
    "command", [["ls"], ["show", "1"], ["request"], ["pin", "1"], ["unpin", "1"], ["prune", "--last", "1"]]
)
def test_root_that_is_not_there(command, tmp_path):
    line = refused(command[0], tmp_path / "nowhere", *command[1:])
    assert f"{tmp_path / 'nowhere'}: no such directory" in line


@pytest.mark.parametrize("command", ["show", "pin", "unpin"])
def test_version_that_is_not_there(command, root):
    line = refused(command, root, "step3")
    assert "no version 'step3'" in line
    assert NAME in line


# -- prune ----------------------------------------------------------------------------------


@pytest.fixture
def five(root: Path) -> Path:
    """Versions of the steps 10 to 50; 20 was the best, 10 is pinned."""
    shutil.rmtree(root)
    registry = Registry.create(root)
    for step in range(10, 60, 10):
        publish(registry, step, *[best(0.9)] * (step == 20), metrics={"val/acc": step / 100}, files=FILES)
    registry.pin("step10")
    return root


FILES = ({"name": "model.safetensors", "bytes": 3_000_000_000, "sha256": "0"},)


def test_prune(five):
    rows = [
        ["v0001-step10", "10", "3", "GB", "keep", "pinned"],
        ["v0002-step20", "20", "3", "GB", "keep", "best"],
        ["v0003-step30", "30", "3", "GB", "remove", "kept", "by", "none", "of", "last=2"],
        ["v0004-step40", "40", "3", "GB", "keep", "last=2"],
        ["v0005-step50", "50", "3", "GB", "keep", "latest;", "last=2"],
    ]
    before = snapshot(five)
    *shown, last = cli("prune", five, "--dry-run", "--last", 2).stdout.splitlines()
    assert [line.split() for line in shown] == [["VERSION", "STEP", "SIZE", "DECISION", "WHY"], *rows]
    assert last == "would remove 1 of 5 versions, 3 GB (last=2)"
    assert snapshot(five) == before, "a dry run changes nothing"
    *shown, last = cli("prune", five, "--last", 2).stdout.splitlines()
    assert [line.split() for line in shown[1:]] == rows
    assert last == "removed 1 of 5 versions, 3 GB (last=2)"
    assert not (five / "v0003-step30").exists()
    assert "step30" not in cli("ls", five).stdout
    assert "no version 'step30'" in refused("show", five, "step30")
    data = json.loads(cli("prune", five, "--json", "--best", 1, "--every-n-steps", 20).stdout)
    assert data["keep"] == {"last": None, "best": 1, "every_n_steps": 20, "max_bytes": None}
    assert (data["dry_run"], data["warnings"], data["not_deleted"]) == (False, [], [])
    assert [(v["step"], v["bytes"], v["keep"]) for v in data["versions"]] == [
        (step, 3_000_000_000, True) for step in (10, 20, 40, 50)
    ]


def snapshot(root: Path) -> dict[str, tuple[int, float]]:
    return {str(p): (s.st_ino, s.st_mtime) for p in (root, *root.rglob("*")) if (s := p.lstat())}


def test_prune_uses_what_the_run_recorded(five):
    done = cli("prune", five, code=2)
    assert "no run has recorded any" in done.stderr
    for option in ("--last", "--best", "--every-n-steps", "--max-bytes"):
        assert option in done.stderr
    Registry(five).note_policy(Keep(last=3))
    assert "(last=3)" in cli("prune", five, "--dry-run").stdout
    assert "(every_n_steps=50)" in cli("prune", five, "--dry-run", "--every-n-steps", 50).stdout, "replaced, not added"
    Registry(five).note_policy(Keep())
    assert "the run that exports there keeps all" in cli("prune", five, code=2).stderr
    assert len(Registry(five).versions()) == 5


def test_prune_that_cannot_do_all(five):
    done = cli("prune", five, "--max-bytes", "5GB", code=1)
    assert "max_bytes=5000000000 cannot be met: the 3 versions that are never removed hold 9 GB" in done.stderr
    assert [v.step for v in Registry(five).versions()] == [10, 20, 50]
    Registry(five).pin("step50")
    assert cli("prune", five, "--max-bytes", "9GB").stdout.endswith(
        "removed 0 of 3 versions, 0 B (max_bytes=9000000000)\n"
    )


def test_prune_by_a_metric_that_nothing_was_chosen_by(tmp_path):
    registry = Registry.create(tmp_path / "exports")
    publish(registry, 1)
    publish(registry, 2)
    assert "--best has no metric to rank by" in refused("prune", registry.root, "--best", 1)
    assert len(registry.versions()) == 2


# -- verify ---------------------------------------------------------------------------------


def verify(directory: Path, code: int, *options: str) -> dict[str, dict[str, str]]:
    done = cli("verify", directory, "--json", *options, code=code)
    checks = json.loads(done.stdout)
    bad = [name for name, check in checks.items() if check["status"] == "failed"]
    assert len(done.stderr.splitlines()) == code
    assert all(name in done.stderr for name in bad)
    return checks


def test_verify(published):
    checks = verify(published / NAME, 0)
    assert {k: v["status"] for k, v in checks.items()} == dict.fromkeys(
        ("hashes", "structure", "load", "generate"), "passed"
    )
    lines = cli("verify", published / NAME, "--no-load").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["hashes", "passed"], ["structure", "passed"], ["load", "skipped"], ["generate", "skipped"],
    ]  # fmt: skip


def test_verify_finds_a_flipped_byte(root):
    weights = root / NAME / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    checks = verify(root / NAME, 1, "--no-load")
    assert checks["structure"]["status"] == "passed"
    assert checks["hashes"]["status"] == "failed"
    assert str(weights) in checks["hashes"]["detail"]


@pytest.mark.parametrize("with_record", [True, False])
def test_verify_finds_a_missing_tensor(with_record, root):
    weights = root / NAME / "model.safetensors"
    with safe_open(weights, "pt") as f:
        kept = {name: f.get_tensor(name) for name in f.keys() if name != "model.norm.weight"}  # noqa: SIM118
    save_file(kept, weights, metadata={"format": "pt"})
    if not with_record:
        (root / NAME / "export.json").unlink()
    checks = verify(root / NAME, 1, "--no-load")
    assert checks["hashes"]["status"] == ("failed" if with_record else "skipped")
    assert checks["structure"]["status"] == "failed"
    assert "model.norm.weight" in checks["structure"]["detail"]


def test_verify_finds_a_missing_file(root):
    (root / NAME / "generation_config.json").unlink()
    checks = verify(root / NAME, 1, "--no-load")
    assert "generation_config.json: listed in export.json, but missing" in checks["hashes"]["detail"]


def test_verify_finds_truncated_weights(root):
    weights = root / NAME / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    checks = verify(root / NAME, 1)
    assert {k: v["status"] for k, v in checks.items()} == dict.fromkeys(("hashes", "structure", "load"), "failed")
    assert f"{weights}: expected" in checks["structure"]["detail"]


def test_verify_of_nothing(tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such directory" in refused("verify", tmp_path / "nowhere")

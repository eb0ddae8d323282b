"""What a person may get wrong on the command line: each slip is one line that says what is meant instead."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.registry import publish
from verl_autoexport.cli.main import main
from verl_autoexport.registry.store import Registry

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns what it says, which for a failure is one line on stderr alone."""

    def check(*args: Any, code: int = 0) -> str:
        assert main([a if isinstance(a, str) else str(a) for a in args]) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        if code:
            assert out == ""
            assert err.count("\n") == 1, err
            assert err.startswith("verl-autoexport: ")
        return err if code else out

    return check


@pytest.fixture
def step(source: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, by links: replace files, do not write into them."""
    return shutil.copytree(source, tmp_path / "run/global_step_7", copy_function=os.link)


def steps(run: Run, checkpoint: Path, output: Path, *args: Any) -> dict[str, Any]:
    """Exports; returns the record."""
    run("export", checkpoint, "--output", output, "--no-verify", *args)
    return json.loads((output / "export.json").read_text())


# -- arguments ------------------------------------------------------------------------------

EXPORT = ("export", "x", "--output", "y")
SIZE, COUNT = "expected a size such as 5GB", "expected a whole number from 1 on"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        *(((*EXPORT, "--workers", v), COUNT) for v in ("-3", "0", "two", "", "1.5", "9" * 30, "²", "٣")),
        *(
            ((*EXPORT, option, v), SIZE)
            for option in ("--memory-budget", "--max-shard-size")
            for v in ("0", "-1", "abc", "", "5XB", "1e9", "nan", "inf", "9" * 40, "0.1", "9999999TB", "٣GB")
        ),
        *((("prune", "x", "--max-bytes", v), SIZE) for v in ("0", "-1", "many", "9" * 5000)),
        *((("prune", "x", option, "0"), COUNT) for option in ("--last", "--best", "--every-n-steps")),
        *(((command, ""), "expected a path, found ''") for command in ("ls", "verify", "request", "prune")),
        (("export", " ", "--output", "y"), "expected a path"),
        (("export", "x", "--output", ""), "--output: expected a path"),
        (("export", "x", "--registry", ""), "--registry: expected a path"),
        (("export", "x", "--output", "s3://bucket/x"), "--output: expected a local path"),
        (("ls", "a\0b"), r"expected a path, found 'a\x00b'"),
        ((*EXPORT, "--lora-config", ""), "--lora-config: expected a path"),
        ((*EXPORT, "--base-model", ""), "--base-model: expected a text that is not empty"),
        ((*EXPORT, "--dtype", ""), "--dtype: invalid choice"),
        ((*EXPORT, "--unknown\n"), r"unrecognized arguments: --unknown\n"),
        *(((*EXPORT, "--ray-address", v), "expected HOST:PORT") for v in ("", "host", "host:x", "host:99999", ":1")),
        (("show", "x", ""), "VERSION: expected a text"),
        (("request", "x", "--note", ""), "--note: expected a text"),
    ],
)
def test_arguments(args, words, run):
    assert words in run(*args, code=2)


# -- paths ----------------------------------------------------------------------------------


def test_paths_that_are_something_else(run, step, tmp_path):
    (file := tmp_path / "file").touch()
    (dangling := tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (loop := tmp_path / "loop").symlink_to(loop)
    os.mkfifo(fifo := tmp_path / "fifo")
    endless = tmp_path / ("x" * 300)
    for path, why in {
        file: "not a directory", fifo: "not a directory", loop: "a link to", endless: "ame too long",
        dangling: f"a link to {tmp_path / 'gone'}, which is not there", tmp_path / "none": "no such directory",
    }.items():  # fmt: skip
        for args in (("ls", path), ("verify", path), ("request", path), ("prune", path, "--last", 1), ("pin", path, 1)):
            assert why in run(*args, code=1)
        assert why in run("export", path, "--output", tmp_path / "out", code=1)
    for path in (file, fifo, loop, file / "below", endless):
        assert str(path) in run("export", step, "--output", path, code=1)
        assert str(path) in run("export", step, "--registry", path, code=1)
    assert "no such file" in run("export", step, "--output", tmp_path / "out", "--lora-config", fifo, code=1)
    assert not (tmp_path / "out").exists()


def test_output_through_links(run, step, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "later").symlink_to("made")
    steps(run, step, tmp_path / "link")
    steps(run, step, tmp_path / "later/../later")
    assert (tmp_path / "link").is_symlink()
    assert {"empty", "made"} <= {p.name for p in tmp_path.iterdir() if (p / "export.json").is_file()}


@pytest.fixture
def published(step: Path, tmp_path: Path) -> Path:
    registry = Registry.create(tmp_path / "run/exports")
    publish(registry, 7)
    (tmp_path / "run/exports/v0001-step7/config.json").write_text("{}")
    return registry.root


def test_places_where_nothing_may_be_written(run, step, published, tmp_path):
    version = published / "v0001-step7"
    (base := tmp_path / "base").mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").touch()
    (links := tmp_path / "links").mkdir()
    before = everything(tmp_path)
    for n, (place, what) in enumerate({
        version: "an exported model", version / "new": "an exported model", step: "a checkpoint",
        step / "actor": "a checkpoint", step / "actor/huggingface": "a checkpoint", step / "new/er": "a checkpoint",
        base: "the base model", base / "new": "the base model",
    }.items()):  # fmt: skip
        (link := links / str(n)).symlink_to(place.parent if not place.exists() else place)
        through = link / place.name if not place.exists() else link
        for path in (place, through, place / "../" / place.name):
            for option in ("--output", "--registry"):
                assert what in run("export", step, option, path, "--base-model", base, code=1)
    for place in (published, published / "new", published / ".staging/new"):
        assert f"{published} is a registry" in run("export", step, "--output", place, code=1)
    shutil.rmtree(links)
    links.mkdir()
    assert everything(tmp_path) == before


def everything(folder: Path) -> dict[str, int]:
    return {str(p): p.lstat().st_mtime_ns for p in folder.rglob("*") if p.name != "links"}


COMMANDS = [("ls",), ("show", "1"), ("request",), ("pin", "1"), ("unpin", "1"), ("prune", "--last", "1")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_root_that_is_no_registry(command, run, step, published, tmp_path):
    (tmp_path / "nothing/deep").mkdir(parents=True)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/main.py").touch()
    before = everything(tmp_path)
    for place, what in {
        step.parent: "a run's directory", step: "a checkpoint", step / "actor": "a checkpoint",
        published / "v0001-step7": "an exported model",
    }.items():  # fmt: skip
        line = run(command[0], place, *command[1:], code=1)
        assert f"{place}: {what}" in line
        assert "registry.json" in line
        assert line.endswith(f"; there is one in {published}\n")
    for place in ("nothing", "code"):
        assert f"{tmp_path / place}: not a registry" in run(command[0], tmp_path / place, *command[1:], code=1)
    assert everything(tmp_path) == before


def test_root_where_a_run_has_not_published_yet(run, tmp_path):
    (root := tmp_path / "exports").mkdir()
    assert "not a registry" in run("ls", root, code=1)
    Registry.create(root)
    before = everything(root)
    run("ls", root)
    run("ls", root, "--json")
    run("prune", root, "--last", 1, "--dry-run")
    assert everything(root) == before
    run("request", root)
    assert len(Registry(root).pending_requests()) == 1
    (damaged := tmp_path / "damaged").mkdir()
    (damaged / "v0001-step7").mkdir()
    assert "v0001-step7: not a version" in run("ls", damaged)


# -- what else is named ---------------------------------------------------------------------


def test_base_model(run, step, tmp_path):
    export = ("export", step, "--output", tmp_path / "out", "--no-verify", "--base-model")
    (tmp_path / "models/qwen-base").mkdir(parents=True)
    near = run(*export, tmp_path / "models/qwen-bsae", code=1)
    assert f"no such directory; there is {tmp_path / 'models/qwen-base'}" in near
    assert "config.json and model.safetensors missing" in run(*export, tmp_path / "models/qwen-base", code=1)
    assert "model.safetensors missing" in run(*export, step / "actor/huggingface", code=1)
    assert "no model of this name in the local Hugging Face cache" in run(*export, "Org/Name", code=1)
    assert "not a model's directory" in run(*export, tmp_path, code=1)
    (tmp_path / "file").touch()
    assert "no such directory" in run(*export, tmp_path / "file", code=1)
    assert not (tmp_path / "out").exists()


def test_lora_config_that_is_not_there_or_not_needed(run, step, tmp_path):
    export = ("export", step, "--output", tmp_path / "out", "--no-verify", "--lora-config")
    for path in (tmp_path / "adapter_config.json", tmp_path):
        assert f"{tmp_path / 'adapter_config.json'}: no such file" in run(*export, path, code=1)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds no LoRA weights" in run(*export, tmp_path, code=1)
    assert not (tmp_path / "out").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_files_that_a_download_left_in_place_of_others(run, step, tmp_path, capsys):
    (base := tmp_path / "base").mkdir()
    (base / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2)}, base / "model.safetensors")
    export = ("export", step, "--output", tmp_path / "out")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"):
        kept = (base / name).rename(tmp_path / "kept") if (base / name).exists() else None
        (base / name).write_text(POINTER)
        line = run(*export, "--base-model", base, code=1)
        assert f"{base / name}: a Git-LFS pointer, not the file itself; run `git lfs pull`" in line
        (base / name).unlink() if kept is None else kept.replace(base / name)
    actor = step / "actor"
    for path in (actor / "model_world_size_2_rank_1.pt", actor / "huggingface/config.json"):
        kept = path.rename(tmp_path / "kept")
        path.write_text(POINTER)
        assert f"{path}: a Git-LFS pointer" in run(*export, code=1)
        path.write_text("<!DOCTYPE html>\n<html><title>401</title></html>")
        assert f"{path}: a web page" in run(*export, code=1)
        path.write_text("")
        assert "empty (0 bytes)" in run(*export, code=1)
        kept.replace(path)
    assert not (tmp_path / "out").exists()
    (exported := tmp_path / "exported").mkdir()
    (exported / "model.safetensors").write_text(POINTER)
    assert main(["verify", str(exported), "--no-load"]) == 1
    assert f"{exported / 'model.safetensors'}: a Git-LFS pointer" in capsys.readouterr().out


# -- checkpoints ----------------------------------------------------------------------------


def test_layouts_of_steps(run, step, tmp_path):
    actor = step / "actor"
    export = ("export", step.parent, "--output", tmp_path / "out")
    (step.parent / "global_step_12").mkdir()
    assert f"the steps 7, 12: give one, such as {step.parent / 'global_step_12'}" in run(*export, code=1)
    (step.parent / "latest_checkpointed_iteration.txt").write_text("7")
    assert f"give one, such as {step}." in run(*export, code=1)
    assert f"give a step of one, such as {step.parent}" in run("export", tmp_path, *export[2:], code=1)
    assert f"There are some in {actor}." in run("export", actor / "huggingface", *export[2:], code=1)

    shutil.copytree(actor, step / "policy", copy_function=os.link)
    assert "actor/ and policy/ both hold shards" in run("export", step, *export[2:], code=1)
    assert steps(run, step / "policy", tmp_path / "named")["step"] == 7
    shutil.rmtree(actor)
    assert steps(run, step, tmp_path / "policy")["source"]["path"] == str(step / "policy")
    (step / "policy").rename(step / "critic")
    assert f"There are some in {step / 'critic'}." in run("export", step, *export[2:], code=1)
    for path in (step / "critic").iterdir():  # as supervised fine-tuning saves
        path.rename(step / path.name)
    assert steps(run, step, tmp_path / "flat")["source"]["path"] == str(step)


def test_shards_of_an_earlier_world_size(run, step, tmp_path):
    actor = step / "actor"
    for rank in range(4):
        os.link(actor / "model_world_size_2_rank_0.pt", actor / f"model_world_size_4_rank_{rank}.pt")
    record = steps(run, step, tmp_path / "out")
    assert record["source"]["world_size"] == 2
    assert [n for n in record["notes"] if "world size 4 lie beside those of 2" in n]
    verified = tmp_path / "verified"
    run("export", step, "--output", verified)
    assert json.loads((verified / "export.json").read_text())["verification"]["logits"]["status"] == "passed"

    export, config = ("export", step, "--output", tmp_path / "other"), actor / "fsdp_config.json"
    for text in ('{"world_size": 3}', '{"world_size": "2"}', "{}", "{", "[]"):
        config.unlink()
        config.write_text(text)
        assert "different world sizes are mixed: [2, 4]" in run(*export, code=1)
    config.unlink()
    assert "are mixed" in run(*export, code=1)
    config.write_text('{"world_size": 2}')
    os.link(actor / "model_world_size_2_rank_0.pt", actor / "model_world_size_2_rank_2.pt")
    assert "ranks 2 do not exist in world size 2" in run(*export, code=1)
    (actor / "model_world_size_2_rank_1.pt").unlink()
    assert "are mixed" in run(*export, code=1)
    assert not (tmp_path / "other").exists()


# -- Ray ------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[int]:
    """A port where something listens that is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_ray_addresses_where_no_cluster_is(run, step, listener, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        quiet = silent.getsockname()[1]
        for address, why in {
            "nonsense.invalid:1": "", "127.0.0.1:1": "refused", "ray://127.0.0.1:1": "refused", "auto": "127.0.0.1:1",
            f"127.0.0.1:{listener}": "something else listens", f"ray://127.0.0.1:{listener}": "something else listens",
            f"127.0.0.1:{quiet}": "timed out",
        }.items():  # fmt: skip
            began = time.monotonic()
            line = run("export", step, "--output", tmp_path / "out", "--ray-address", address, code=1)
            assert "no Ray cluster answers there" in line
            assert why in line
            assert time.monotonic() - began < 20, "Ray's own attempts take more than a minute"

"""A checkpoint directory is not trusted: what it says is refused in one line, and costs neither memory nor files."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import EMBED, STEP, edit, edit_config, rank_file
from verl_autoexport.cli.main import main
from verl_autoexport.errors import AutoExportError, PlanError, SourceError
from verl_autoexport.export.pipeline import export_to_directory, export_to_registry
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.model.lora import peft_config
from verl_autoexport.model.skeleton import build_skeleton
from verl_autoexport.registry import lease, state
from verl_autoexport.registry.record import read_record
from verl_autoexport.registry.store import Registry
from verl_autoexport.shards.safetensors_files import INDEX_NAME, model_files, weight_files
from verl_autoexport.sources import holds
from verl_autoexport.sources.fsdp.rank_files import FsdpFiles, rank_files
from verl_autoexport.sources.saved_files import check_links
from verl_autoexport.system.untrusted import is_plain_name, read_json

BOMBS = {
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "array": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "cut": b'{"a": "b',
}
ARGUMENTS = {"verify": False}


def refused(checkpoint: Path, where: Path, *kinds: type[AutoExportError]) -> str:
    with pytest.raises(kinds or AutoExportError) as caught:
        export_to_directory(checkpoint_spec(checkpoint, **ARGUMENTS), where / "out", LocalRunner(1))
    assert "\n" not in str(caught.value)
    assert not (where / "out").exists()
    return str(caught.value)


# -- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "nul\0", "x" * 300, 7, None, ["a"]]
)
def test_an_index_names_files_in_its_directory_only(name, tmp_path):
    assert not is_plain_name(name)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(SourceError, match=rf"{INDEX_NAME}: (weight_map names|its weight_map)"):
        weight_files(tmp_path)


def test_links_and_pipes_beside_the_shards_stay_where_they_are(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    beside = made / "actor/huggingface"
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.json").write_text("secret")
    (beside / "link.json").symlink_to(secret / "key.json")
    (beside / "folder").symlink_to(secret)
    (beside / "up.json").symlink_to("../../../secret/key.json")
    os.mkfifo(beside / "pipe.json")
    os.mkfifo(made / "actor/lora_train_meta.json")
    hold = holds.make_hold(made, STEP, "actor")
    for number, source in enumerate((made, hold.directory)):
        output = tmp_path / f"out{number}"
        export_to_directory(checkpoint_spec(source, **ARGUMENTS), output, LocalRunner(1))
        assert not {"link.json", "up.json", "pipe.json", "folder"} & {p.name for p in output.rglob("*")}
        assert not any(b"secret" in p.read_bytes() for p in output.rglob("*") if p.is_file())


PUBLISHED = ("huggingface", "huggingface/config.json", "adapter_config.json", "lora_train_meta.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_no_link_out_of_the_checkpoint(name, own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    path, elsewhere = made / "actor" / name, tmp_path / "elsewhere"
    path.rename(elsewhere) if path.exists() else elsewhere.write_text('{"r": 8, "lora_alpha": 8}')
    path.symlink_to(elsewhere)
    message = refused(made, tmp_path, SourceError)
    assert str(path) in message
    assert f"leads to {elsewhere}, which is outside" in message
    with pytest.raises(SourceError, match="outside"):
        holds.make_hold(made, STEP, "actor")
    path.unlink()
    path.symlink_to(path)  # in a circle: as if it were not there
    check_links(made / "actor")
    assert "huggingface" not in name or "not found" in refused(made, tmp_path, PlanError)


def test_links_that_a_user_makes(own_checkpoint, tmp_path):
    """To a whole step, to a whole role, within the step, to rank files."""
    made = own_checkpoint("even")
    (tmp_path / "global_step_8").symlink_to(made)
    (tmp_path / "global_step_9").mkdir()
    (tmp_path / "global_step_9/actor").symlink_to(made / "actor")
    inside = Path(shutil.copytree(made, tmp_path / "global_step_10"))
    (inside / "actor/huggingface").rename(inside / "huggingface")
    (inside / "actor/huggingface").symlink_to("../huggingface")
    gathered = Path(shutil.copytree(made, tmp_path / "global_step_11"))
    for rank in range(2):
        rank_file(gathered, rank).unlink()
        (gathered / "actor" / rank_file(made, rank).name).symlink_to(rank_file(made, rank))
    for step in (8, 9, 10, 11):
        spec = checkpoint_spec(tmp_path / f"global_step_{step}", **ARGUMENTS)
        assert export_to_directory(spec, tmp_path / f"out{step}", LocalRunner(1)).step == step


def test_nodes_send_nothing_that_a_link_out_of_the_checkpoint_leads_to(own_checkpoint, tmp_path):
    made = own_checkpoint("even") / "actor"
    (tmp_path / "secret.json").write_text("secret")
    (made / "huggingface/link.json").symlink_to(tmp_path / "secret.json")
    assert made / "huggingface/config.json" in holds.config_files(made)
    assert not any(p.name == "link.json" for p in holds.config_files(made))


def test_a_world_of_a_billion_ranks(tmp_path):
    (tmp_path / "model_world_size_1000000000_rank_0.pt").touch()
    with pytest.raises(SourceError, match="no model_world_size"):
        rank_files(tmp_path)
    (tmp_path / "model_world_size_999999_rank_0.pt").touch()
    with pytest.raises(SourceError, match=r"world size 999999.*999998 in all"):
        rank_files(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_the_umask_leaves(umask, checkpoint, tmp_path):
    root = tmp_path / "exports"
    before = os.umask(umask)
    try:
        registry = Registry.create(root)
        registry.own("p/x")
        registry.request()
        spec = checkpoint_spec(checkpoint("even"), **ARGUMENTS)
        version = export_to_registry(spec, registry, LocalRunner(1))
        registry.pin(version)
        copied = Path(shutil.copytree(checkpoint("even"), tmp_path / f"global_step_{STEP}"))
        hold = holds.make_hold(copied, STEP, "actor")
    finally:
        os.umask(before)
    made = [root, *(p for p in root.rglob("*") if not p.is_symlink()), hold.path, hold.path / "pin.json"]
    assert len(made) > 12
    for path in made:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        mode = path.stat().st_mode & 0o777
        assert mode == wanted or (path.name.endswith(".lock") and not mode & ~wanted), path
        assert not mode & 0o002


# -- memory ---------------------------------------------------------------------------------


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def rewrite(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Replace the pickle in a shard; the rest stays."""
    with zipfile.ZipFile(path) as archive:
        records = {r.filename: archive.read(r) for r in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_memory(protocol, summed, own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    pickled = pickle.dumps({EMBED: Calls(bytearray, 1 << 40)}, protocol)
    rewrite(rank_file(made, 0), lambda _: pickled)
    if not summed:  # as if they were switched off
        whole = rank_file(made, 0).read_bytes()
        rank_file(made, 0).write_bytes(whole.replace(zlib.crc32(pickled).to_bytes(4, "little"), bytes(4)))
    message = refused(made, tmp_path, SourceError)
    assert "bytearray" in message
    assert str(rank_file(made, 0)) in message


@pytest.mark.parametrize("behind", ["nothing", "an archive"])
def test_a_pickle_alone(behind, own_checkpoint, tmp_path):
    """As torch wrote files before it wrote archives; zip files may have something in front."""
    made = own_checkpoint("even")
    whole = rank_file(made, 0).read_bytes() if behind == "an archive" else b""
    rank_file(made, 0).write_bytes(pickle.dumps(Calls(bytearray, 1 << 40), 2) + whole)
    assert "not a whole torch file" in refused(made, tmp_path, SourceError)


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_two_pickles_of_which_one_asks_for_memory(name, own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    with zipfile.ZipFile(rank_file(made, 0), "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # zipfile's, of the name that is there twice
            archive.writestr(f"{folder}/{name}", pickle.dumps({EMBED: Calls(bytearray, 1 << 40)}, 2))
    assert "2 pickles in it, expected one" in refused(made, tmp_path, SourceError)


def test_a_mesh_of_too_many_ranks(own_checkpoint, tmp_path, monkeypatch):
    made = own_checkpoint("even")
    monkeypatch.setattr("verl_autoexport.sources.fsdp.rank_files.BLOCK", 4)  # bytes; two ranks need more
    assert "_rank_map of the device mesh" in refused(made, tmp_path, SourceError)


def test_a_tensor_that_is_more_than_its_storage(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    path = rank_file(made, 0)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    part = bytes([75, 24, 133])  # half of a norm's weight: BININT1 24, TUPLE1
    changed = pickled.replace(part, bytes([75, 48, 133]))
    content = path.read_bytes().replace(pickled, changed)
    sums = (zlib.crc32(data).to_bytes(4, "little") for data in (pickled, changed))
    path.write_bytes(content.replace(*sums))
    message = refused(made, tmp_path, SourceError)
    assert "192 bytes from byte" in message
    assert "has 96 and the file" in message


def test_an_archive_that_unpacks_to_more_than_it_is(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    rewrite(rank_file(made, 0), lambda _: b"\0" * (64 << 20), zipfile.ZIP_DEFLATED)
    assert "would unpack to" in refused(made, tmp_path, SourceError)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": [10**9]}, {"hidden_size": 10**15}, {"vocab_size": 10**12},
        {"hidden_size": "48"}, {"num_attention_heads": 0}, {"max_position_embeddings": -1}, {"architectures": {"a": 1}},
        {"model_type": ["qwen2"]}, {"model_type": None}, {"torch_dtype": 7}, {"rope_parameters": 7}, {"auto_map": 3},
    ],
)  # fmt: skip
def test_a_config_of_no_model(values, own_checkpoint, tmp_path):
    made = edit_config(own_checkpoint("even"), **values)
    message = error_of(
        lambda: export_to_directory(checkpoint_spec(made, **ARGUMENTS), tmp_path / "out", LocalRunner(1))
    )
    harmless = values.keys() & {"max_position_embeddings", "torch_dtype", "rope_parameters", "auto_map"}
    assert harmless or message, "exported"
    assert "\n" not in (message or "")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 70]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        7,
    ],
)
def test_headers_of_no_tensor(entry, tmp_path):
    write_safetensors(tmp_path, json.dumps({"w": entry}).encode())
    with pytest.raises(SourceError) as caught:
        model_files(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


ONE = '{"dtype": "U8", "shape": [4], "data_offsets": [%d, %d]}'


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (f'{{"w": {ONE % (0, 4)}, "w": {ONE % (4, 8)}}}', "the key 'w' occurs twice"),
        (f'{{"v": {ONE % (0, 4)}, "w": {ONE % (3, 7)}}}', "tensors overlap"),
        (f'{{"v": {ONE % (0, 4)}, "w": {ONE % (0, 4)}}}', "tensors overlap"),
    ],
)
def test_headers_of_tensors_in_each_others_place(header, words, tmp_path):
    write_safetensors(tmp_path, header.encode())
    with pytest.raises(SourceError, match=words):
        model_files(tmp_path)


def write_safetensors(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


# -- texts for a person ---------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\r\nstep 9: published\u202e\u2028\x9b31m\x00"


def assert_harmless(text: str) -> None:
    """Every line is one of ours, and none holds more than text."""
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\nstep 9: published" not in text
    assert r"\x1b[2J" in text


@pytest.mark.parametrize("kind", [AutoExportError, *AutoExportError.__subclasses__()])
def test_errors_are_printed_as_they_are_meant(kind):
    assert_harmless(str(kind(f"{EVIL}: expected")))
    assert str(kind("one", "two")) == "one\ntwo", "lines of its own"
    assert str(kind("é 日本 \\n")) == "é 日本 \\n"
    assert len(str(kind("x" * 10_000))) < 5000
    assert str(pickle.loads(pickle.dumps(kind(EVIL)))) == str(kind(EVIL)), "the same from another process"


def test_names_of_tensors_and_paths(own_checkpoint, tmp_path, capsys):
    made = edit(own_checkpoint("even"), lambda shards: shards.update({EVIL[:-1]: shards[EMBED]}))
    assert main(["export", str(made), "--output", str(tmp_path / "out")]) == 1
    assert_harmless(capsys.readouterr().err)
    assert main(["ls", str(tmp_path / EVIL[:-1])]) == 1
    assert_harmless(capsys.readouterr().err)


def test_what_a_registry_says(checkpoint, tmp_path, capsys):
    registry = Registry.create(tmp_path / "exports")
    version = export_to_registry(checkpoint_spec(checkpoint("even"), **ARGUMENTS), registry, LocalRunner(1))
    record = json.loads((version.path / "export.json").read_text())
    trigger = {"policy": "best", "name": EVIL, "reason": EVIL, "metric": EVIL, "value": 1.0}
    check = {"status": "passed", "detail": EVIL}
    record |= {"notes": [EVIL], "triggers": [trigger], "base_model": EVIL, "architectures": [EVIL]}
    record |= {"verification": {"structure": check, EVIL: check}, "source": record["source"] | {"path": EVIL}}
    (version.path / "export.json").write_text(json.dumps(record))
    registry.journal("failed", step=4, reason=EVIL)
    root = str(registry.root)
    for command in (["ls", root], ["show", root, version.name], ["prune", root, "--last", "1"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert_harmless(out) if command[0] != "prune" else assert_all_printable(out)
        if command[0] != "prune":
            assert main([*command, "--json"]) == 0
            assert EVIL in capsys.readouterr().out.encode().decode("unicode_escape"), "data stays what it is"
    (version.path / "config.json").write_text(json.dumps({"architectures": [EVIL], "model_type": EVIL}))
    main(["verify", str(version.path), "--no-load"])
    done = capsys.readouterr()
    assert_all_printable(done.out + done.err)


def assert_all_printable(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n"))


# -- JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BOMBS, "pipe", "folder", "huge"])
def test_json_bombs_give_one_clear_error_each(kind, own_checkpoint, tmp_path):
    made = own_checkpoint("even")

    def plant(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "huge":
            path.touch()
            os.truncate(path, 1 << 40)
        else:
            path.write_bytes(BOMBS[kind])
        return path

    with pytest.raises((ValueError, OSError)) as caught:
        read_json(plant(tmp_path / "any.json"))
    assert "\n" not in str(caught.value)
    assert "config.json" in refused_after(plant, made / "actor/huggingface/config.json", made, tmp_path)
    shutil.copy(made / "reference/config.json", replaced(made / "actor/huggingface/config.json"))
    plant(made / "actor/fsdp_config.json")
    export_to_directory(checkpoint_spec(made, **ARGUMENTS), tmp_path / "out", LocalRunner(1))
    if kind not in ("pipe", "folder"):  # those are as if they were not there
        for name in ("lora_train_meta.json", "adapter_config.json"):
            with pytest.raises(PlanError, match=name):
                peft_config.read_settings(plant(tmp_path / name / name).parent, None)
        with pytest.raises(SourceError, match=INDEX_NAME):
            weight_files(plant(tmp_path / "base" / INDEX_NAME).parent)
    plant(tmp_path / ".autoexport/step_1-x/pin.json")
    assert holds.find_holds(tmp_path) == []
    if kind not in ("folder", "huge"):
        with pytest.raises(AutoExportError, match=r"export\.json"):
            read_record(plant(tmp_path / "v1/export.json"))
        plant(tmp_path / "root/.owner.json")
        assert lease.read(tmp_path / "root") is None
        plant(tmp_path / "root/registry.json")
        assert state.load(tmp_path / "root")[0] == state.State()


def refused_after(plant: Callable[[Path], Path], path: Path, made: Path, where: Path) -> str:
    plant(path)
    return refused(made, where, AutoExportError)


def replaced(path: Path) -> Path:
    path.rmdir() if path.is_dir() else path.unlink()
    return path


# -- fuzzing --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def error_of(call: Callable[[], Any]) -> str | None:
    """Its message where `call` raises an error of ours; any other goes through."""
    try:
        call()
    except AutoExportError as e:
        return str(e)
    return None


def only_errors_of_ours(call: Callable[[], Any]) -> None:
    message = error_of(call)
    assert message is None or (message.isprintable() and 0 < len(message) < 5000)


def fuzz_headers(examples: int) -> Callable[..., None]:
    entries = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "I64", "X9", ""]) | JSON,
            "shape": st.lists(st.integers(-2, 1 << 66), max_size=3) | JSON,
            "data_offsets": st.lists(st.integers(-8, 1 << 66), max_size=3) | JSON,
        },
    )
    headers = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries | JSON, max_size=3)

    @settings(max_examples=examples, **QUIET)
    @given(headers.map(json.dumps).map(str.encode) | st.binary(max_size=40))
    @example(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
    @example(b'{"w":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}')
    @example(b"[]")
    @example(b'{"\\n": {"dtype": "F32", "data_offsets": [0, 0], "shape": []}}')
    @example(b'{"' + b"x" * 100_000 + b'": {"dtype": "F32", "data_offsets": [0, 0], "shape": []}}')
    def run(folder: Path, header: bytes) -> None:
        write_safetensors(folder, header)
        only_errors_of_ours(lambda: model_files(folder))

    return run


def fuzz_json(examples: int) -> Callable[..., None]:
    keys = st.sampled_from(["step", "origin", "fingerprint", "linked", "request", "token", "pid", "place", "born", "r",
                            "lora_alpha", "peft_type", "weight_map", "FSDP_version", "schema_version", "next_version",
                            "pins", "pointers", "removed", "superseded", "version", "triggers", "files"])  # fmt: skip

    @settings(max_examples=examples, **QUIET)
    @given(st.dictionaries(keys, JSON, max_size=8))
    @example({"r": "8", "lora_alpha": 16, "peft_type": "LORA"})
    @example({"token": "x", "pid": 10**30, "place": None})
    def run(folder: Path, value: dict[str, Any]) -> None:
        text = json.dumps(value)
        hold = folder / ".autoexport/step_1-x"
        hold.mkdir(parents=True, exist_ok=True)
        for path in ("adapter_config.json", "lora_train_meta.json", INDEX_NAME, "registry.json", ".owner.json",
                     "export.json", "fsdp_config.json", ".autoexport/step_1-x/pin.json"):  # fmt: skip
            (folder / path).write_text(text)
        only_errors_of_ours(lambda: peft_config.read_settings(folder, None))
        only_errors_of_ours(lambda: weight_files(folder))
        only_errors_of_ours(lambda: state.load(folder))
        only_errors_of_ours(lambda: read_record(folder))
        only_errors_of_ours(lambda: lease.living(folder, 0, 0))
        holds.find_holds(folder)

    return run


def fuzz_config(examples: int) -> Callable[..., None]:
    keys = st.sampled_from(["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type",
                            "architectures", "tie_word_embeddings", "rope_parameters", "dtype", "num_key_value_heads",
                            "layer_types", "text_config", "auto_map", "id2label", "head_dim"])  # fmt: skip

    @settings(max_examples=examples, **QUIET)
    @given(st.dictionaries(keys, JSON | st.integers(-2, 300), max_size=4))
    @example({"rope_parameters": None, "dtype": None, "auto_map": [None]})
    def run(folder: Path, good: dict[str, Any], value: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps(good | value))
        only_errors_of_ours(lambda: build_skeleton(folder, "bfloat16"))

    return run


def fuzz_shards(examples: int) -> Callable[..., None]:
    """A shard with bytes of its directory and pickle changed; values are covered by their checksums."""

    @settings(max_examples=examples, **QUIET)
    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), st.randoms())
    def run(path: Path, whole: bytes, spots: list[int], changes: list[tuple[float, int]], rng: random.Random) -> None:
        content = bytearray(whole)
        for where, byte in changes:
            content[spots[int(where * (len(spots) - 1))]] = byte
        path.write_bytes(content)
        only_errors_of_ours(lambda: FsdpFiles(path.parent).manifest())

    return run


def pickle_spots(path: Path) -> list[int]:
    """Positions of the pickle and of the archive's directory in a shard."""
    with zipfile.ZipFile(path) as archive:
        record = next(r for r in archive.infolist() if r.filename.endswith("data.pkl"))
        begin = record.header_offset
        return [*range(begin, begin + record.file_size + 90), *range(archive.start_dir, path.stat().st_size)]


def fuzz(folder: Path, made: Path, examples: int) -> None:
    config = json.loads((made / "actor/huggingface/config.json").read_text())
    fuzz_headers(examples)(folder)
    fuzz_json(examples)(folder)
    fuzz_config(examples // 4)(folder, config)
    path = rank_file(made, 0)
    fuzz_shards(examples // 2)(path, path.read_bytes(), pickle_spots(path))


def test_fuzzing(own_checkpoint, tmp_path):
    fuzz(tmp_path, own_checkpoint("even"), 60)


@pytest.mark.full
def test_fuzzing_for_long(own_checkpoint, tmp_path):
    fuzz(tmp_path, own_checkpoint("even"), int(os.environ.get("AUTOEXPORT_FUZZ_EXAMPLES", "4000")))

"""Bad input: one clear error each, and nothing is published or left, whether into a directory or a registry."""

from __future__ import annotations

import copy
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor.placement_types import Partial

from tests.support.checkpoints import EMBED, HEAD, NORM, STEP, edit, edit_config, rank_file, truncate
from tests.support.exports import assert_same_model
from verl_autoexport.errors import AutoExportError, ConfigError, MergeError, PlanError, RegistryError, SourceError
from verl_autoexport.export.pipeline import export_to_directory, export_to_registry
from verl_autoexport.export.spec import checkpoint_spec
from verl_autoexport.merge.local_runner import LocalRunner
from verl_autoexport.registry.store import Registry
from verl_autoexport.sources.fsdp.rank_files import read_rank_file

Refuses = Callable[..., str]


class Meanwhile(LocalRunner):
    """Something happens between reading the metadata and merging."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(workers=1)
        self.action = action

    def run(self, jobs, progress):
        self.action()
        return super().run(jobs, progress)


@pytest.fixture(params=["directory", "registry"])
def refuses(request: pytest.FixtureRequest, tmp_path: Path) -> Refuses:
    """Exports, and checks the error's kind, that it is one line with `words`, and that nothing is left."""

    def check(
        checkpoint: Path, error: type[AutoExportError], *words: str, meanwhile=lambda: None,
        where: Path = tmp_path / "published", **options: Any,
    ) -> str:  # fmt: skip
        def export() -> None:
            spec = checkpoint_spec(checkpoint, verify=False, **options)
            if request.param == "directory":
                export_to_directory(spec, where / "out", Meanwhile(meanwhile))
            else:
                export_to_registry(spec, Registry.create(where), Meanwhile(meanwhile))

        where.mkdir(exist_ok=True)
        with pytest.raises(error) as caught:
            export()
        message = str(caught.value)
        assert [w for w in words if w not in message] == [], message
        assert "\n" not in message
        assert leftovers(where) == []
        return message

    return check


def leftovers(where: Path) -> list[str]:
    """What is there beyond the empty folders and the lock of a registry."""
    assert Registry(where).versions() == []
    return [p.name for p in where.rglob("*") if p.name not in (".staging", ".requests", ".trash", ".lock", "filler")]


def put(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(shards: dict[str, Any]) -> None:
        shards[name].to_local().view(-1)[3] = value

    return change


def test_the_damage_is_what_is_refused(own_checkpoint, tmp_path):
    """Loaded and saved again without a change, the shards export: what the tests below see is their own doing."""
    made = edit(own_checkpoint("even"), lambda shards: None)
    spec = checkpoint_spec(made, verify=False)
    assert export_to_directory(spec, tmp_path / "out", Meanwhile(lambda: None)).step == STEP


# -- files ----------------------------------------------------------------------------------


def test_no_checkpoint(tmp_path, refuses):
    refuses(tmp_path / "global_step_9", SourceError, "global_step_9", "no such directory")
    (tmp_path / "global_step_9/actor").mkdir(parents=True)
    refuses(tmp_path / "global_step_9", SourceError, "global_step_9", "no FSDP shards", "save_contents")


def test_missing_ranks(own_checkpoint, refuses):
    made = own_checkpoint("hsdp")
    rank_file(made, 3).unlink()
    refuses(made, SourceError, str(made / "actor"), "world size 4", "rank 3 are missing")
    rank_file(made, 1).unlink()
    refuses(made, SourceError, "world size 4", "ranks 1, 3 are missing")


def test_mixed_world_sizes(own_checkpoint, refuses):
    made = own_checkpoint("even")
    shutil.copy(rank_file(made, 0), made / "actor/model_world_size_4_rank_0.pt")
    (made / "actor/fsdp_config.json").unlink()  # which would tell
    refuses(made, SourceError, str(made / "actor"), "different world sizes", "[2, 4]")


@pytest.mark.parametrize("nbytes", [0, 100, None])
def test_truncated_shard(nbytes, own_checkpoint, refuses):
    made = own_checkpoint("even")
    truncate(rank_file(made, 1), nbytes)
    refuses(made, SourceError, str(rank_file(made, 1)), "rank 1", "empty (0 bytes)" if nbytes == 0 else "truncated")


def test_shard_truncated_after_its_metadata_was_read(own_checkpoint, refuses):
    made = own_checkpoint("even")
    path = rank_file(made, 1)
    refuses(made, SourceError, str(path), meanwhile=lambda: truncate(path))


@pytest.mark.parametrize("name", [EMBED, NORM])
def test_a_flipped_bit(name, own_checkpoint, refuses):
    made = own_checkpoint("even")
    path, offset = rank_file(made, 1), read_rank_file(rank_file(made, 1), 1)[name].byte_offset + 7
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    refuses(made, SourceError, str(path), "not those that training wrote", "data/")


def test_no_check_sums_to_compare_with(own_checkpoint, tmp_path):
    made = own_checkpoint("even")
    torch.serialization.set_crc32_options(False)
    try:
        edit(made, lambda shards: None)
    finally:
        torch.serialization.set_crc32_options(True)
    export_to_directory(checkpoint_spec(made, dtype="source", verify=False), tmp_path / "out", LocalRunner(1))
    assert_same_model(tmp_path / "out", made / "reference")


def test_shard_saved_again_meanwhile(own_checkpoint, refuses):
    made = own_checkpoint("even")
    path = rank_file(made, 1)
    before = path.stat().st_size
    refuses(
        made, SourceError, path.name, "changed while being exported", meanwhile=lambda: edit(made, put(NORM, 2.0), (1,))
    )
    assert path.stat().st_size == before


def test_shard_removed_meanwhile(own_checkpoint, refuses):
    made = own_checkpoint("even")
    path = rank_file(made, 1)
    refuses(made, SourceError, str(path), meanwhile=path.unlink)


def test_malicious_pickle_does_not_run(own_checkpoint, tmp_path, refuses):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    made = own_checkpoint("even")
    torch.save({EMBED: Evil()}, rank_file(made, 1))
    refuses(made, SourceError, str(rank_file(made, 1)), "rank 1", "weights_only")
    assert not (tmp_path / "ran").exists()


def test_not_a_dict_of_tensors(own_checkpoint, refuses):
    made = own_checkpoint("even")
    torch.save([torch.ones(2)], rank_file(made, 0))
    refuses(made, SourceError, str(rank_file(made, 0)), "rank 0", "dict of tensors", "list")


# -- ranks that contradict each other -------------------------------------------------------


def test_key_on_one_rank_only(own_checkpoint, refuses):
    made = edit(own_checkpoint("even"), lambda shards: shards.pop(NORM), ranks=(1,))
    refuses(made, SourceError, NORM, "rank 0", "rank 1", "world size 2")


def test_replicas_that_differ(own_checkpoint, refuses):
    made = edit(own_checkpoint("hsdp"), lambda shards: shards[NORM].to_local()[0].add_(1), ranks=(3,))
    refuses(made, SourceError, NORM, "ranks 1 and 3 are replicas", "different values of [24] at [24]")


def test_local_shapes_do_not_add_up(own_checkpoint, refuses):
    def shorten(shards):
        shards[EMBED]._local_tensor = shards[EMBED].to_local()[:-1].clone()  # no constructor makes such a tensor

    made = edit(own_checkpoint("even"), shorten, ranks=(1,))
    refuses(
        made,
        SourceError,
        EMBED,
        "rank 1",
        str(rank_file(made, 1)),
        "do not add up",
        "[128, 48]",
        "should hold [64, 48], found [63, 48]",
    )


def test_file_of_another_rank(own_checkpoint, refuses):
    made = own_checkpoint("even")
    shutil.copy(rank_file(made, 0), rank_file(made, 1))
    refuses(made, SourceError, f"{rank_file(made, 1)} (rank 1)", "written by rank 0")


def test_ranks_of_different_models(own_checkpoint, refuses):
    made = own_checkpoint("even")
    bf16 = own_checkpoint("bf16")
    shutil.copy(rank_file(bf16, 1), rank_file(made, 1))
    refuses(made, SourceError, EMBED, "rank 0 says float32 [128, 48]", "rank 1 says bfloat16 [131, 48]")


def test_large_plain_tensors_that_differ_in_one_value(own_checkpoint, refuses):
    def change(shards):
        shards[EMBED] = torch.zeros(6_000_000)

    made = edit(own_checkpoint("even"), change)
    edit(made, lambda shards: shards[EMBED][4_000_000:4_000_001].add_(1), ranks=(1,))
    refuses(made, SourceError, EMBED, "different values", "rank 0", "rank 1")


def test_plain_tensors_that_differ(own_checkpoint, refuses):
    name = "resnet.embedder.embedder.normalization.running_mean"
    made = edit(own_checkpoint("buffers"), lambda shards: shards[name].add_(1), ranks=(1,))
    refuses(made, SourceError, name, "different values", "rank 0", "rank 1")


def test_unknown_placement(own_checkpoint, refuses):
    def replace(shards):  # its spec is one object with those of other tensors
        shards[NORM]._spec = copy.copy(shards[NORM]._spec)
        shards[NORM]._spec.placements = (Partial(),)

    refuses(edit(own_checkpoint("even"), replace), SourceError, NORM, str(Partial()), "not supported")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(48, dtype=torch.complex64), "complex64"),
        (torch.ones(48, 2)[:, 0], "not contiguous"),
    ],
)
def test_tensor_that_cannot_be_read_by_position(tensor, words, own_checkpoint, refuses):
    made = edit(own_checkpoint("even"), lambda shards: shards.update({NORM: tensor}))
    refuses(made, SourceError, NORM, "rank 0", words)


# -- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "source"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value, dtype, own_checkpoint, refuses):
    made = edit(own_checkpoint("even"), put(HEAD, value), ranks=(1,))
    words = "1 NaN and 0 Inf" if value != value else "0 NaN and 1 Inf"
    refuses(made, MergeError, HEAD, words, dtype=dtype)


def test_nan_in_a_packed_expert(own_checkpoint, refuses):
    made = edit(own_checkpoint("moe"), put("model.layers.1.mlp.experts.down_proj", float("nan")), ranks=(1,))
    refuses(made, MergeError, "model.layers.1.mlp.experts.3.down_proj.weight", "1 NaN")


def test_overflow_in_float16(own_checkpoint, refuses):
    made = edit(own_checkpoint("even"), put(HEAD, 1e6), ranks=(1,))
    refuses(made, MergeError, HEAD, "1 Inf", "float32 → float16 overflowed", dtype="float16")


# -- the model ------------------------------------------------------------------------------


def test_no_config(own_checkpoint, refuses):
    made = own_checkpoint("even")
    (made / "actor/huggingface/config.json").unlink()
    refuses(made, PlanError, str(made / "actor/huggingface/config.json"), "not found")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read it"),
        ("[1]", "cannot read it"),
        ('{"model_type": "qwen2"}', "`architectures` is missing"),
        ('{"model_type": "no_such_type", "architectures": ["A"]}', "no_such_type"),
        ('{"model_type": "qwen2", "architectures": ["NoSuchForCausalLM"]}', "NoSuchForCausalLM is unknown"),
        ('{"model_type": "qwen2", "architectures": ["logging"]}', "logging"),
        ('{"model_type": "qwen2", "architectures": "Qwen2ForCausalLM"}', "architectures"),
        ('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": -5}', "Qwen2ForCausalLM"),
    ],
)
def test_broken_config(text, words, own_checkpoint, refuses):
    made = own_checkpoint("even")
    config = made / "actor/huggingface/config.json"
    config.write_text(text)
    refuses(made, PlanError, str(config), words)


def test_missing_tensor(own_checkpoint, refuses):
    made = edit(own_checkpoint("even"), lambda shards: shards.pop(NORM))
    refuses(made, PlanError, "not a complete Qwen2ForCausalLM", f"missing {NORM}")


def test_unexpected_tensor(own_checkpoint, refuses):
    made = edit(own_checkpoint("even"), lambda shards: shards.update({"value_head.weight": shards[NORM]}))
    refuses(made, PlanError, "unexpected value_head.weight")


def test_integers_where_the_model_has_numbers(own_checkpoint, refuses):
    made = edit(own_checkpoint("buffers"), to_integers)
    refuses(made, PlanError, "running_mean", "has bfloat16", "the shards have int64")


def to_integers(shards: dict[str, Any]) -> None:
    name = "resnet.embedder.embedder.normalization.running_mean"
    shards[name] = shards[name].long()


def test_config_of_another_size(own_checkpoint, refuses):
    made = edit_config(own_checkpoint("even"), vocab_size=256)
    refuses(made, PlanError, EMBED, "[256, 48]", "[128, 48]")


def test_lora(own_checkpoint, refuses):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    made = edit(own_checkpoint("even"), lambda shards: shards.update({name: torch.ones(4, 4)}))
    refuses(made, PlanError, name, "LoRA")


def test_tied_tensors_with_different_values(own_checkpoint, refuses):
    made = edit_config(own_checkpoint("even"), tie_word_embeddings=True)
    refuses(made, PlanError, EMBED, HEAD, "values differ", "tie_word_embeddings")


# -- where it goes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"dtype": "int8"}, {"max_shard_size": "five"}, {"memory_budget": "-1"}, {"lora": "merged"}]
)
def test_option_that_cannot_be(option, checkpoint, refuses):
    refuses(checkpoint("even"), ConfigError, next(iter(option)), next(iter(option.values())), **option)


def test_output_that_exists(checkpoint, tmp_path):
    spec = checkpoint_spec(checkpoint("even"), verify=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match=f"{name}: exists and is not empty"):
            export_to_directory(spec, tmp_path / name, LocalRunner(1))
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["file", "mine"]
    (tmp_path / "empty").mkdir()
    export_to_directory(spec, tmp_path / "empty", LocalRunner(1))
    assert (tmp_path / "empty/model.safetensors").exists()


def test_output_below_a_file(checkpoint, tmp_path):
    spec = checkpoint_spec(checkpoint("even"), verify=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file/out: cannot be written: (Not a directory|File exists)"):
        export_to_directory(spec, tmp_path / "file/out", LocalRunner(1))
    with pytest.raises(RegistryError, match=r"file/out: .*not writable"):
        Registry.create(tmp_path / "file/out")


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Path]:
    """A directory that even root cannot write to."""
    path = tmp_path / "immutable"
    path.mkdir(mode=0o555)
    done = subprocess.run(["chattr", "+i", path], capture_output=True, text=True) if os.geteuid() == 0 else None
    if done and done.returncode:
        pytest.skip(f"root can write everywhere here: {done.stderr.strip()}")
    yield path
    if done:
        subprocess.run(["chattr", "-i", path], check=True)


def test_output_that_cannot_be_written_to(checkpoint, immutable):
    spec = checkpoint_spec(checkpoint("even"), verify=False)
    with pytest.raises(ConfigError, match=r"immutable/out: cannot be written: (Operation not permitted|Permission)"):
        export_to_directory(spec, immutable / "out", LocalRunner(1))
    with pytest.raises(RegistryError, match=r"immutable: .*not writable"):
        Registry.create(immutable)
    assert list(immutable.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    mounted = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk-{size}"
        path.mkdir()
        try:
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"no small file system can be mounted here: {getattr(e, 'stderr', e)}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_not_enough_space(checkpoint, small_disk, refuses):
    def merging():
        raise AssertionError("it must be told before merging")

    disk = small_disk("1m")
    refuses(checkpoint("even"), MergeError, "not enough space", "are needed", where=disk, meanwhile=merging)


def test_disk_that_fills_up_meanwhile(checkpoint, small_disk, refuses):
    disk = small_disk("80m")

    def fill():
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as f:
            while f.write(b"x" * (1 << 20)):
                pass

    refuses(checkpoint("even"), MergeError, "model.safetensors", "No space left", where=disk, meanwhile=fill)


def test_file_size_limit(checkpoint, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "verl_autoexport", "export", checkpoint("even"), "--no-verify", "--registry"]
    done = subprocess.run([*command, tmp_path / "published"], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"verl-autoexport: .*model\.safetensors: cannot be written: File too large\.\n", done.stderr)
    assert leftovers(tmp_path / "published") == ["registry.json"]
    assert subprocess.run([*command, tmp_path / "published"]).returncode == 0


def test_file_system_that_becomes_read_only(checkpoint, small_disk):
    disk = small_disk("90m")

    def remount():
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    spec = checkpoint_spec(checkpoint("even"), verify=False)
    with pytest.raises(MergeError, match=r"model\.safetensors: cannot be created: Read-only file system"):
        export_to_directory(spec, disk / "out", Meanwhile(remount))
    assert not (disk / "out").exists()
    with pytest.raises(RegistryError, match=r"not writable: .*Read-only file system"):
        Registry.create(disk)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    export_to_directory(spec, disk / "out", LocalRunner(1))

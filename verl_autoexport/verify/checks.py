"""The checks of a merged directory: structure always, loading and generation if there is memory for them."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from verl_autoexport.errors import SourceError, VerifyError
from verl_autoexport.merge.plan import MergePlan
from verl_autoexport.shards import safetensors_files
from verl_autoexport.system import subprocesses, untrusted
from verl_autoexport.verify.result import CheckResult, passed, skipped

_OVERHEAD = 1 << 30  # bytes: imports of torch and transformers, activations of a few tokens


@dataclass(frozen=True)
class Source:
    """The origin of a directory: rank files, the configuration of the LoRA in them, its base if it is not in them.

    `saved` is the directory with the run's `config.json`, `nbytes` the memory that a second
    model takes, which only LoRA needs, and shards with other names than those in memory.
    """

    shards: Path
    saved: Path
    lora: Mapping[str, Any] | None = None
    base: Path | None = None
    nbytes: int = 0


@dataclass(frozen=True)
class LoadRequest:
    """The request to the process that loads a directory; paths are absolute. See `check_loading` for its fields.

    `not_loaded` is the reason why only the assets are compared.
    """

    directory: str
    generate: bool = True
    trust_remote_code: bool = False
    external_lib: str | None = None
    adapter_of: str | None = None
    shards: str | None = None
    saved: str | None = None
    lora: Mapping[str, Any] | None = None
    base: str | None = None
    assets: Mapping[str, str | None] | None = None
    carried: Sequence[str] = ()
    not_loaded: str = ""


def check_structure(directory: Path, plan: MergePlan) -> CheckResult:
    """Checks that every planned file has the planned header and length, and that no other weight files exist.

    The merge has already checked that all values are finite. Raises VerifyError naming the file.
    """
    for file in plan.files:
        path = directory / file.name
        found = read_header(path)
        expected = json.loads(file.header[8:])
        if found != expected:
            differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            raise VerifyError(f"{path}: header differs from the plan at {', '.join(differ[:8])}.")
        if path.stat().st_size != file.nbytes:
            raise VerifyError(f"{path}: expected {file.nbytes} bytes, found {path.stat().st_size}.")
    if plan.index is not None and read_json(directory / safetensors_files.INDEX_NAME) != plan.index:
        raise VerifyError(f"{directory / safetensors_files.INDEX_NAME}: differs from the plan.")
    if stray := {p.name for p in directory.glob("*.safetensors")} - {f.name for f in plan.files}:
        raise VerifyError(f"{directory}: unexpected weight files {sorted(stray)}.")
    return passed(f"{len(plan.tensors)} tensors: names, shapes, dtypes, all values finite")


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file; raises VerifyError naming the file."""
    try:
        return safetensors_files.read_header(path)[1]
    except SourceError as e:
        raise VerifyError(str(e)) from e


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises VerifyError naming it."""
    try:
        return untrusted.read_json(path)
    except (OSError, ValueError) as e:
        raise VerifyError(f"{path}: not readable as JSON: {e}") from e


def check_loading(
    directory: Path,
    nbytes: int,
    *,
    load: bool | str = "auto",
    generate: bool | str = "auto",
    max_memory: int = 16 << 30,
    timeout_s: float = 600,
    trust_remote_code: bool = False,
    external_lib: str | None = None,
    adapter_of: Path | None = None,
    source: Source | None = None,
    assets: Mapping[str, str | None] | None = None,
    carried: Sequence[str] = (),
) -> dict[str, CheckResult]:
    """Loads `directory` in a fresh process on the CPU, generates a few tokens, compares logits with those of `source`.

    `nbytes` is the size of the weights. With `auto`, a check is skipped, with the reason, if it would
    need more than `max_memory` or than the free memory; any check is skipped after `timeout_s` seconds.
    `adapter_of`: `directory` is a PEFT adapter for the model whose config is there. `assets`: the
    directories that its tokenizer and processor must equal (`Reference.to_json`), compared at any
    size, unless `load` is False. `carried` are the tensors in it that its class does not read.
    Raises VerifyError if a check that ran has failed.
    """
    names: tuple[str, ...] = ("load", "generate", "logits") if source else ("load", "generate")
    names = ("assets", *names) if assets else names
    if load is False:
        return dict.fromkeys(names, skipped("verify.load=false"))
    too_large = _too_large(nbytes + (source.nbytes if source else 0), max_memory) if load == "auto" else ""
    if too_large and not assets:
        return dict.fromkeys(names, skipped(too_large))
    request = LoadRequest(
        str(directory.resolve()),
        generate=generate is not False,
        trust_remote_code=trust_remote_code,
        external_lib=external_lib,
        adapter_of=_absolute(adapter_of),
        assets=assets,
        carried=tuple(carried),
        not_loaded=too_large,
        **_of_source(source),
    )
    try:
        found = _ask(request, timeout_s)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(names, skipped(f"not finished within verify.timeout_s={timeout_s:g}"))
    if found is None and load is not True:  # killed from outside, which proves nothing about the model
        return dict.fromkeys(names, skipped("the process was killed (SIGKILL), probably for memory"))
    return _passed(directory, found, names)


def _passed(directory: Path, found: Mapping[str, CheckResult] | None, names: Sequence[str]) -> dict[str, CheckResult]:
    """The results of a fresh process; VerifyError if a check failed, or if there are none."""
    if found is None:
        raise VerifyError(f"{directory}: the load check was killed (SIGKILL), probably for memory")
    for name, check in found.items():
        if check.status == "failed":
            raise VerifyError(f"{directory}: {name} failed: {check.detail}")
    return {name: found.get(name, skipped("load failed")) for name in names}


def _of_source(source: Source | None) -> dict[str, Any]:
    if source is None:
        return {}
    paths = {"shards": source.shards, "saved": source.saved, "base": source.base}
    return {key: _absolute(path) for key, path in paths.items()} | {"lora": source.lora}


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _too_large(nbytes: int, max_memory: int) -> str:
    """The reason why models of `nbytes` bytes cannot be loaded here; empty if they can."""
    need, free = nbytes + nbytes // 10 + _OVERHEAD, psutil.virtual_memory().available
    limit = f"verify.max_memory is {_gib(max_memory)}" if need > max_memory else f"{_gib(free)} are free"
    return f"needs about {_gib(need)}, {limit}" if need > min(max_memory, free) else ""


def _ask(request: LoadRequest, timeout_s: float) -> dict[str, CheckResult] | None:
    """The results of a fresh process, by check; None if it was killed. The output of a model's code is ignored."""
    with tempfile.TemporaryDirectory(prefix="verl-autoexport-") as folder:
        answer = Path(folder, "result.json")
        done = subprocess.run(
            subprocesses.command("verl_autoexport.verify.load_in_child", str(answer)),
            input=json.dumps(asdict(request)), capture_output=True, encoding="utf-8", errors="replace",
            timeout=timeout_s, env=_environment(),
        )  # fmt: skip
        if done.returncode == 0:
            return {name: CheckResult(**check) for name, check in read_json(answer).items()}
    if done.returncode == -signal.SIGKILL:
        return None
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    raise VerifyError(f"{request.directory}: the load check exited with {done.returncode}: {last}")


def _environment() -> dict[str, str]:
    """Environment for CPU only, offline, few threads: GPUs and cores belong to training."""
    env = {k: v for k, v in subprocesses.environment().items() if not k.startswith(("RAY_", "VERL_"))}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**env, **fixed, "OMP_NUM_THREADS": "2"}


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB"

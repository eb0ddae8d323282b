"""The check of a directory from its own content alone, for `verl-autoexport verify`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from verl_autoexport.errors import AutoExportError, VerifyError
from verl_autoexport.merge.plan import SAFETENSORS_DTYPE
from verl_autoexport.model.base_model import base_directory
from verl_autoexport.model.conversion import class_outputs, spell
from verl_autoexport.model.lora.adapter import WEIGHTS_NAME
from verl_autoexport.model.lora.peft_config import CONFIG_NAME, read_settings
from verl_autoexport.model.planner import ADAPTER_FOLDER
from verl_autoexport.model.skeleton import build_skeleton
from verl_autoexport.registry.record import ExportRecord, read_record
from verl_autoexport.shards.manifest import ITEMSIZE
from verl_autoexport.shards.safetensors_files import INDEX_NAME
from verl_autoexport.sources.download_stubs import check_fetched
from verl_autoexport.sources.fsdp.discovery import absence
from verl_autoexport.verify import checks as verify
from verl_autoexport.verify.result import CheckResult, failed, passed, skipped

Checks = dict[str, CheckResult]


def check_directory(directory: Path, *, load: bool = True, trust_remote_code: bool = False) -> Checks:
    """Checks hashes against `export.json`, tensors against the architecture, then loads and generates.

    A failed check is reported, not raised; later ones still run if they can.
    """
    if not directory.is_dir():
        raise VerifyError(f"{directory}: {absence(directory)}; expected a version, or another exported directory.")
    record = read_record(directory / "export.json") if (directory / "export.json").exists() else None
    checks = {"hashes": _run(lambda: _hashes(directory, record))}
    loading = partial(_load, load="auto" if load else False, trust_remote_code=trust_remote_code)
    if (directory / CONFIG_NAME).is_file():
        return checks | _adapter(directory, None, loading)
    files = sorted(directory.glob("*.safetensors"))
    checks["structure"] = _run(lambda: _structure(directory, files, record, trust_remote_code))
    checks |= loading(directory, sum(f.stat().st_size for f in files), carried=_listed(record, "carried"))
    if (directory / ADAPTER_FOLDER / CONFIG_NAME).is_file():
        adapter = _adapter(directory / ADAPTER_FOLDER, directory, loading)
        checks |= {"adapter": adapter["structure" if adapter["structure"].status == "failed" else "load"]}
    return checks


def _load(directory: Path, nbytes: int, **options: Any) -> Checks:
    try:
        return verify.check_loading(directory, nbytes, **options)
    except VerifyError as e:
        return {"load": failed(str(e))}


def _adapter(directory: Path, base: Path | None, loading: Callable[..., Checks]) -> Checks:
    """Checks a PEFT adapter; `base` has the config of its model, otherwise the adapter names that model."""
    structure = _run(lambda: _adapter_structure(directory))
    if structure.status == "failed":
        return {"structure": structure}
    name = verify.read_json(directory / CONFIG_NAME).get("base_model_name_or_path")
    if (base := base or base_directory(name)) is None:
        return {"structure": structure, "load": skipped(f"its base {name!r} is not here")}
    nbytes = (directory / WEIGHTS_NAME).stat().st_size
    return {"structure": structure} | loading(directory, nbytes, adapter_of=base)


def _adapter_structure(directory: Path) -> CheckResult:
    config, _ = read_settings(directory, directory)
    header = verify.read_header(directory / WEIGHTS_NAME)
    header.pop("__metadata__", None)
    _check_length(directory / WEIGHTS_NAME, header)
    factors = sorted(name for name in header if ".lora_" in name and "magnitude" not in name and "bias" not in name)
    other = str.maketrans("AB", "BA")
    lone = [
        n
        for n in factors
        if re.sub("(?<=lora_)[AB]|(?<=embedding_)[AB]", lambda m: m[0].translate(other), n) not in header
    ]
    if lone or not factors:
        raise VerifyError(f"{directory / WEIGHTS_NAME}: lora_A without lora_B, or the reverse: {lone[:8]}.")
    return passed(f"LoRA of rank {config['r']}, {len(header)} tensors")


def _run(check: Callable[[], CheckResult]) -> CheckResult:
    try:
        return check()
    except (AutoExportError, OSError, ValueError) as e:  # a record may have names that no file can have
        return failed(str(e))


def _hashes(directory: Path, record: ExportRecord | None) -> CheckResult:
    check_fetched(sorted(directory.iterdir()))
    if record is None:
        return skipped("no export.json here")
    for entry in record.files:
        path = directory / entry.get("name", "")
        if not path.resolve().is_relative_to(directory.resolve()) or not path.is_file():
            raise VerifyError(f"{path}: listed in export.json, but missing.")
        with path.open("rb") as f:
            digest = hashlib.sha256()
            while block := f.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != (expected := entry.get("sha256")):
            raise VerifyError(f"{path}: sha256 {expected} expected, {digest.hexdigest()} found: it was changed.")
    return passed(f"{len(record.files)} files as export.json lists them")


def _structure(directory: Path, files: list[Path], record: ExportRecord | None, trust_remote_code: bool) -> CheckResult:
    if not files:
        raise VerifyError(f"{directory}: no *.safetensors file.")
    found: dict[str, Any] = {}
    for file in files:
        header = verify.read_header(file)
        header.pop("__metadata__", None)
        if twice := found.keys() & header.keys():
            raise VerifyError(f"{file}: {sorted(twice)[0]} is also in another file.")
        _check_length(file, header)
        found |= {name: (entry["dtype"], tuple(entry["shape"]), file.name) for name, entry in header.items()}
    if len(files) > 1:
        _check_index(directory, found)
    dtype = record.dtype if record and record.dtype in ITEMSIZE else "source"
    skeleton = build_skeleton(directory, dtype, trust_remote_code)
    carried = _listed(record, "carried")
    outputs = class_outputs(skeleton)
    spelling = spell(skeleton, outputs, found.keys() - set(carried))
    expected: dict[str, Any] = {o.name: o.shape for o in spelling.apply(outputs)}
    for name in _listed(record, "transposed"):
        if name in expected:
            expected[name] = (*expected[name][:-2], expected[name][-1], expected[name][-2])
    for name in carried:
        expected[name] = found[name][1] if name in found else "a tensor of the base"
    wrong = sorted(k for k in found.keys() | expected.keys() if found.get(k, (0, 0))[1] != expected.get(k))
    if wrong:
        raise VerifyError(
            f"{directory}: not the tensors of {skeleton.name}: "
            + "; ".join(
                f"{k}: expected {expected.get(k, 'nothing')}, found {found.get(k, 'nothing')}" for k in wrong[:8]
            )
        )
    if bad := [k for k, v in found.items() if v[0] not in SAFETENSORS_DTYPE.values()]:
        raise VerifyError(f"{directory}: {bad[0]} has the unknown dtype {found[bad[0]][0]}.")
    return passed(f"{len(found)} tensors of {skeleton.name}")


def _listed(record: ExportRecord | None, key: str) -> tuple[str, ...]:
    """The names under `key` of the contract in `export.json`."""
    return tuple(record.verification.get("contract", {}).get(key, ())) if record else ()


def _check_length(file: Path, header: dict[str, Any]) -> None:
    with file.open("rb") as f:
        begin = 8 + int.from_bytes(f.read(8), "little")
    expected = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (found := file.stat().st_size) != expected:
        raise VerifyError(f"{file}: expected {expected} bytes by its header, found {found}: it was cut or written to.")


def _check_index(directory: Path, found: dict[str, Any]) -> None:
    index = verify.read_json(directory / INDEX_NAME)
    if not isinstance(index, dict) or index.get("weight_map") != {k: v[2] for k, v in found.items()}:
        raise VerifyError(f"{directory / INDEX_NAME}: weight_map differs from the files' content.")

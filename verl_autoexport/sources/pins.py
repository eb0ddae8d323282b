"""Hard links that keep a checkpoint's files while they are chosen and exported.

A pin is `<default_local_dir>/.autoexport/step_N-XXXXXXXX/`, beside the checkpoints, with
links to the shards and the `huggingface/` files, and `pin.json`: what it is, and, once
the step is chosen, the export request. So a request survives the processes that made it.
A link keeps the file, not its content: the fingerprint tells when verl wrote it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp_files import find_checkpoint, fingerprint, rank_files
from verl_autoexport.untrusted import is_count, read_json

FOLDER = ".autoexport"
_INFO = "pin.json"
_EXTRA = ("fsdp_config.json", "lora_train_meta.json", "adapter_config.json")


@dataclass(frozen=True)
class Pin:
    """A pinned step. `directory` is where to read from: the links, or, where there can be none, the original."""

    path: Path
    step: int
    origin: str
    fingerprint: str
    linked: bool
    request: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def directory(self) -> Path:
        return self.path if self.linked else Path(self.origin)


def make_pin(checkpoint_dir: Path, step: int, role: str) -> Pin:
    """Pin the `role` of `global_step_N`; raises SourceError when its shards are not all there.

    Where the file system has no hard links, the pin only records the step (`linked` is
    False): then verl may delete the files before they are exported.
    """
    source = find_checkpoint(checkpoint_dir, role)
    origin = str(source.absolute())
    files = [*rank_files(source), *(source / name for name in _EXTRA)]
    files += sorted(p for p in (source / "huggingface").rglob("*") if p.is_file() and not _is_weights(p))
    mark = fingerprint(source)
    path = checkpoint_dir.absolute().parent / FOLDER / f"step_{step}-{mark[:8]}"
    linked = True
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for file in files:
            linked = linked and _link(file, path / file.relative_to(source))
        pin = Pin(path, step, origin, mark, linked)
        _write(pin)
    except OSError as e:
        release(path)  # links left behind would keep the space that verl frees
        raise SourceError(f"{path}: step {step} cannot be pinned: {e}") from e
    return pin


def choose(pin: Pin, request: Mapping[str, Any]) -> None:
    """Record durably that the pinned step is to be exported as `request` (JSON) says."""
    _write(replace(pin, request=request))


def release(path: Path) -> None:
    """Drop the links; the checkpoint's own files are verl's and stay as they are."""
    shutil.rmtree(path, ignore_errors=True)


def find_pins(checkpoints: Path) -> list[Pin]:
    """All pins beside the checkpoints, by step; what is half made is removed."""
    pins = []
    for path in (checkpoints / FOLDER).glob("step_*"):
        try:
            pins.append(_read(path))
        except (OSError, ValueError, KeyError, TypeError):
            release(path)
    return sorted(pins, key=lambda p: p.step)


def _read(path: Path) -> Pin:
    info = read_json(path / _INFO)
    pin = Pin(path, **{k: info[k] for k in ("step", "origin", "fingerprint", "linked", "request")})
    kinds = {"origin": str, "fingerprint": str, "linked": bool, "request": dict | None}
    if not is_count(pin.step) or not all(isinstance(getattr(pin, key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path / _INFO}: fields of wrong types")
    return pin


def _link(file: Path, link: Path) -> bool:
    if not file.exists():
        return True
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, link)
    except OSError:  # EPERM, EXDEV, EOPNOTSUPP, EMLINK: by file system; all mean the same here
        return False
    return True


def _is_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".bin", ".index.json"))


def _write(pin: Pin) -> None:
    info = {
        "step": pin.step, "origin": pin.origin, "fingerprint": pin.fingerprint, "linked": pin.linked,
        "request": pin.request,
    }  # fmt: skip
    temporary = pin.path / f".{_INFO}.tmp"
    temporary.write_text(json.dumps(info))
    temporary.replace(pin.path / _INFO)

"""Hard links that keep a checkpoint's files while they are chosen and exported.

A pin is `<default_local_dir>/.autoexport/step_N-XXXXXXXX/`, beside the checkpoints, with
links to the shards and the `huggingface/` files, and `pin.json`: what it is, and, once
the step is chosen, the export request. So a request survives the processes that made it.
A link keeps the file, not its content: the fingerprint tells when verl wrote it again. A run
directory may be copied to another disk with its pins, whose links then are files of their own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.fsdp.discovery import check_links, find_checkpoint, fingerprint, rank_files
from verl_autoexport.system.untrusted import is_count, leads_out, read_json

logger = logging.getLogger(__name__)
FOLDER = ".autoexport"
MAX_ATTEMPTS = 3
"""Failed exports of a chosen step after which no start of the run tries again."""
MAX_KEPT = 3
"""Steps whose exports have failed and that are held all the same."""
_INFO = "pin.json"
EXTRA = ("fsdp_config.json", "lora_train_meta.json", "adapter_config.json")
"""Small files beside the shards that tell how to read them."""


@dataclass(frozen=True)
class Pin:
    """A pinned step. `directory` is where to read from: the links, or, where there can be none, the original.

    `spread`: each node has a directory of this name with the shards on its own disk.
    """

    path: Path
    step: int
    origin: str
    fingerprint: str
    linked: bool
    spread: bool = False
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
    paths, mark = rank_files(source), fingerprint(source)
    path = pin_path(checkpoint_dir, step, mark)
    pin = Pin(path, step, str(source.absolute()), mark, link_files(source, paths, path))
    record(pin)
    return pin


def pin_path(checkpoint_dir: Path, step: int, mark: str) -> Path:
    """Where the pin of a step is, by the last characters of its fingerprint."""
    return checkpoint_dir.absolute().parent / FOLDER / f"step_{step}-{mark[-8:]}"


def link_files(source: Path, paths: Iterable[Path], pin: Path) -> bool:
    """Link these rank files, and what lies beside them, into the new directory `pin`; False where links cannot be.

    Raises SourceError, and leaves nothing, where the directory cannot be made.
    """
    files = [*paths, *(source / name for name in EXTRA), *config_files(source)]
    try:
        shutil.rmtree(pin, ignore_errors=True)
        pin.mkdir(parents=True)
        return all(_link(file, pin / file.relative_to(source)) for file in files)
    except OSError as e:
        release(pin)  # links left behind would keep the space that verl frees
        raise SourceError(f"{pin}: cannot be pinned: {e}") from e


def config_files(source: Path) -> list[Path]:
    """What verl saved of the model beside its shards; weights, and links out of `source`, left out.

    Raises SourceError where the directory itself is such a link.
    """
    check_links(source)
    found = (p for p in (source / "huggingface").rglob("*") if p.is_file() and not _is_weights(p))
    return sorted(p for p in found if not p.is_symlink() or not leads_out(p, source))


def record(pin: Pin) -> None:
    """Write what `find_pins` finds; raises SourceError, and leaves no links, where that cannot be."""
    try:
        _write(pin)
    except OSError as e:
        release(pin.path)
        raise SourceError(f"{pin.path}: step {pin.step} cannot be pinned: {e}") from e


def choose(pin: Pin, request: Mapping[str, Any]) -> None:
    """Record durably that the pinned step is to be exported as `request` (JSON) says."""
    _write(replace(pin, request=request))


def count_attempt(path: Path) -> int:
    """Record durably that one more export of the chosen step has failed; returns how many have."""
    pin = _read(path)
    attempts = int((pin.request or {}).get("attempts", 0)) + 1
    choose(pin, {**(pin.request or {}), "attempts": attempts})
    return attempts


def too_many(checkpoints: Path) -> list[Pin]:
    """Of the steps whose exports failed those beyond the newest `MAX_KEPT`: kept, they would fill training's disk."""
    failed = []
    for path in (checkpoints / FOLDER).glob("step_*"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # being made, or for a person to look at
            failed += [pin] if ((pin := _read(path)).request or {}).get("attempts") else []
    return sorted(failed, key=lambda pin: pin.step)[:-MAX_KEPT]


def is_last_copy(path: Path) -> bool:
    """Whether the checkpoint that the pin was made of is gone, or has other content; False where it holds none."""
    try:
        pin = _read(path)
        return pin.linked and fingerprint(Path(pin.origin)) != fingerprint(path)
    except (SourceError, OSError, ValueError, KeyError, TypeError):
        return path.exists()


def given_up(pin: Pin, output_dir: Path) -> str:
    """What a person may do about a step that is not tried again."""
    return (
        f"step {pin.step} has failed {MAX_ATTEMPTS} times and is not tried again. By hand: verl-autoexport export "
        f"{pin.path} --registry {output_dir}; to give it up: rm -r {pin.path}"
    )


def release(path: Path) -> None:
    """Drop the links; the checkpoint's own files are verl's and stay as they are."""
    shutil.rmtree(path, ignore_errors=True)


def find_pins(checkpoints: Path) -> list[Pin]:
    """All pins beside the checkpoints, by step; what is half made is removed, what cannot be read is left."""
    pins = []
    for path in (checkpoints / FOLDER).glob("step_*"):
        try:
            pins.append(_read(path))
        except FileNotFoundError:
            release(path)
        except (OSError, ValueError, KeyError, TypeError) as e:
            logger.warning(
                "verl_autoexport: %s cannot be read (%r); it may be the last copy of a step: export it by hand, or "
                "remove it: rm -r %s", path / _INFO, e, path,
            )  # fmt: skip
    return sorted(pins, key=lambda p: p.step)


def _read(path: Path) -> Pin:
    info = read_json(path / _INFO)
    kinds = {"origin": str, "fingerprint": str, "linked": bool, "spread": bool, "request": dict | None}
    pin = Pin(path, info["step"], **{key: info.get(key, False) if key == "spread" else info[key] for key in kinds})
    if not is_count(pin.step) or not all(isinstance(getattr(pin, key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path / _INFO}: fields of wrong types")
    return replace(pin, origin=str(_beside(path, pin.step, Path(pin.origin))))


def _beside(path: Path, step: int, origin: Path) -> Path:
    """Where the checkpoint of a pin is: with it, also after both were moved."""
    name = f"global_step_{step}"
    if name not in origin.parts:
        return origin
    place = len(origin.parts) - origin.parts[::-1].index(name)
    return path.absolute().parent.parent.joinpath(name, *origin.parts[place:])


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
        "spread": pin.spread, "request": pin.request,
    }  # fmt: skip
    temporary = pin.path / f".{_INFO}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(info))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(pin.path / _INFO)
    for folder in (pin.path, pin.path.parent):
        _sync(folder)


def _sync(folder: Path) -> None:
    """Make the names in it durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems refuse; their server orders the names itself
            os.fsync(fd)
    finally:
        os.close(fd)

"""Holds: hard links that keep a checkpoint's files while they are chosen and exported.

A hold is `<default_local_dir>/.autoexport/step_N-XXXXXXXX/`, beside the checkpoints, with
links to the shards and the `huggingface/` files, and with `pin.json`, which describes the hold and, once
the step is chosen, has the export request. So a request survives the processes that made it.
A link keeps the file, not its content; the fingerprint shows whether verl has rewritten it. A run
directory may be copied to another disk with its holds, whose links then become separate files.
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
from verl_autoexport.sources.formats import locate, open_source
from verl_autoexport.sources.saved_files import check_links, settings_files
from verl_autoexport.system.untrusted import is_count, leads_out, read_json

logger = logging.getLogger(__name__)
FOLDER = ".autoexport"
MAX_ATTEMPTS = 3
"""The number of failed exports of a chosen step after which no start of the run tries again."""
MAX_KEPT = 3
"""The number of steps whose exports have failed and that stay held all the same."""
_INFO = "pin.json"


@dataclass(frozen=True)
class Hold:
    """A held step. `directory` is the place to read from: the links, or the original if there are none.

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


def make_hold(checkpoint_dir: Path, step: int, role: str) -> Hold:
    """Holds the `role` of `global_step_N`; raises SourceError if some of its shards are missing.

    If the file system has no hard links, the hold only records the step (`linked` is
    False), and verl may delete the files before they are exported.
    """
    source, format_ = locate(checkpoint_dir, role)
    paths, mark = format_.files(source), format_.open(source).fingerprint
    path = hold_path(checkpoint_dir, step, mark)
    hold = Hold(path, step, str(source.absolute()), mark, link_files(source, paths, path))
    record(hold)
    return hold


def hold_path(checkpoint_dir: Path, step: int, mark: str) -> Path:
    """The path of a step's hold, from the last characters of its fingerprint."""
    return checkpoint_dir.absolute().parent / FOLDER / f"step_{step}-{mark[-8:]}"


def link_files(source: Path, paths: Iterable[Path], hold: Path) -> bool:
    """Link these files, and those that belong to them, into the new directory `hold`; False where links cannot be.

    Raises SourceError, and leaves nothing, if the directory cannot be made.
    """
    files = [*paths, *settings_files(source), *config_files(source)]
    try:
        shutil.rmtree(hold, ignore_errors=True)
        hold.mkdir(parents=True)
        return all(_link(file, hold / file.relative_to(source)) for file in files)
    except OSError as e:
        release(hold)  # remaining links would keep the space that verl frees
        raise SourceError(f"{hold}: cannot be held: {e}") from e


def config_files(source: Path) -> list[Path]:
    """The files of the model that verl saved beside its shards, without weights and without links out of `source`.

    Raises SourceError if the directory itself is such a link.
    """
    check_links(source)
    found = (p for p in (source / "huggingface").rglob("*") if p.is_file() and not _is_weights(p))
    return sorted(p for p in found if not p.is_symlink() or not leads_out(p, source))


def record(hold: Hold) -> None:
    """Writes the file that `find_holds` looks for; raises SourceError, and leaves no links, if that fails."""
    try:
        _write(hold)
    except OSError as e:
        release(hold.path)
        raise SourceError(f"{hold.path}: step {hold.step} cannot be held: {e}") from e


def choose(hold: Hold, request: Mapping[str, Any]) -> None:
    """Records durably that the held step is to be exported according to `request` (JSON)."""
    _write(replace(hold, request=request))


def count_attempt(path: Path) -> int:
    """Records durably that one more export of the chosen step has failed; returns the number of failures."""
    hold = _read(path)
    attempts = int((hold.request or {}).get("attempts", 0)) + 1
    choose(hold, {**(hold.request or {}), "attempts": attempts})
    return attempts


def too_many(checkpoints: Path) -> list[Hold]:
    """The failed steps beyond the newest `MAX_KEPT`; to keep them would fill training's disk."""
    failed = []
    for path in (checkpoints / FOLDER).glob("step_*"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # being made, or left to a person
            failed += [hold] if ((hold := _read(path)).request or {}).get("attempts") else []
    return sorted(failed, key=lambda hold: hold.step)[:-MAX_KEPT]


def is_last_copy(path: Path) -> bool:
    """Whether the hold's checkpoint is gone or has other content; False if the hold has no shards itself."""
    try:
        hold = _read(path)
        return hold.linked and open_source(Path(hold.origin)).fingerprint != open_source(path).fingerprint
    except (SourceError, OSError, ValueError, KeyError, TypeError):
        return path.exists()


def given_up(hold: Hold, output_dir: Path) -> str:
    """The choices that a person has for a step that is not tried again."""
    return (
        f"step {hold.step} has failed {MAX_ATTEMPTS} times and is not tried again. By hand: verl-autoexport export "
        f"{hold.path} --registry {output_dir}; to give it up: rm -r {hold.path}"
    )


def release(path: Path) -> None:
    """Deletes the links; the checkpoint's own files are verl's and stay unchanged."""
    shutil.rmtree(path, ignore_errors=True)


def find_holds(checkpoints: Path) -> list[Hold]:
    """All holds beside the checkpoints, by step; half-made ones are removed, unreadable ones left."""
    found = []
    for path in (checkpoints / FOLDER).glob("step_*"):
        try:
            found.append(_read(path))
        except FileNotFoundError:
            release(path)
        except (OSError, ValueError, KeyError, TypeError) as e:
            logger.warning(
                "verl_autoexport: %s cannot be read (%r); it may be the last copy of a step: export it by hand, or "
                "remove it: rm -r %s", path / _INFO, e, path,
            )  # fmt: skip
    return sorted(found, key=lambda p: p.step)


def _read(path: Path) -> Hold:
    info = read_json(path / _INFO)
    kinds = {"origin": str, "fingerprint": str, "linked": bool, "spread": bool, "request": dict | None}
    hold = Hold(path, info["step"], **{key: info.get(key, False) if key == "spread" else info[key] for key in kinds})
    if not is_count(hold.step) or not all(isinstance(getattr(hold, key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path / _INFO}: fields of wrong types")
    return replace(hold, origin=str(_beside(path, hold.step, Path(hold.origin))))


def _beside(path: Path, step: int, origin: Path) -> Path:
    """The place of a hold's checkpoint: beside the hold, even after both were moved."""
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
    except OSError:  # EPERM, EXDEV, EOPNOTSUPP or EMLINK by file system; all mean that links are impossible
        return False
    return True


def _is_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".bin", ".index.json"))


def _write(hold: Hold) -> None:
    info = {
        "step": hold.step, "origin": hold.origin, "fingerprint": hold.fingerprint, "linked": hold.linked,
        "spread": hold.spread, "request": hold.request,
    }  # fmt: skip
    temporary = hold.path / f".{_INFO}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(info))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(hold.path / _INFO)
    for folder in (hold.path, hold.path.parent):
        _sync(folder)


def _sync(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems refuse; their server orders the names itself
            os.fsync(fd)
    finally:
        os.close(fd)

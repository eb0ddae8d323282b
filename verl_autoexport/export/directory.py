"""A directory of its own that appears whole or not at all, whatever happens to whoever writes it."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from verl_autoexport.errors import ConfigError
from verl_autoexport.registry.staging import Staging


@contextmanager
def appears_whole(output: Path) -> Iterator[Path]:
    """An empty directory beside `output`, which takes its name at the end; after an error nothing is left.

    A lock beside it dies with its writer. What a killed one left for the same `output` is removed first.
    """
    target = Path(os.path.realpath(output))
    try:
        staging = _begin(output, target)
    except OSError as e:
        raise ConfigError(f"--output {output}: cannot be written: {e.strerror}.") from e
    try:
        yield staging.path
        try:
            staging.path.rename(target)  # over an empty directory, if there is one
        except OSError as e:
            raise ConfigError(f"--output {output}: cannot be put there: {e.strerror}.") from e
    finally:
        with suppress(OSError):
            staging.remove()


def _begin(output: Path, target: Path) -> Staging:
    _check(output, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staging = _staging(target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with suppress(NotImplementedError):  # no locks on this file system: then nobody removes what is left
            staging.lock.acquire(timeout=0)
        staging.path.mkdir()
    except BaseException:
        staging.release()
        raise
    return staging


def _check(output: Path, target: Path) -> None:
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"--output {output}: exists and is not empty; nothing is overwritten. Name another directory."
        )
    if os.path.ismount(target):
        raise ConfigError(f"--output {output}: a mount point, which cannot be replaced; name a directory in it.")


def _remove_leftovers(target: Path) -> None:
    like = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    names = {name.removesuffix(".lock") for name in os.listdir(target.parent)}
    for name in filter(like.fullmatch, names):
        left = _staging(target.parent / name)
        with suppress(OSError, NotImplementedError):  # a living export holds the lock
            left.lock.acquire(timeout=0)
            left.remove()


def _staging(path: Path) -> Staging:
    return Staging(path, FileLock(f"{path}.lock", thread_local=False))

"""Files that several versions have in common: kept once on disk, as hard links."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from verl_autoexport.registry.versions import Version
from verl_autoexport.system.durable_files import temp_path
from verl_autoexport.system.untrusted import is_plain_name

MIN_BYTES = 1 << 20
"""Smaller files are not worth a link."""
SharedFiles = Mapping[tuple[str, int], Path]
"""sha256 (hex) and bytes -> a file of an earlier version that its record says this of."""
log = logging.getLogger(__name__)


def find_shared(versions: Iterable[Version]) -> dict[tuple[str, int], Path]:
    """Of all versions, the newest last: it is the least likely to be removed meanwhile."""
    found = {}
    for version in sorted(versions, key=lambda v: v.number):
        for file in version.record.files:
            name, size, digest = (file.get(key) for key in ("name", "bytes", "sha256"))
            if is_plain_name(name) and isinstance(size, int) and size >= MIN_BYTES and isinstance(digest, str):
                found[digest, size] = version.path / name
    return found


def link_shared(path: Path, digest: str, nbytes: int, shared: SharedFiles) -> bool:
    """Replace `path` by a link to an earlier version's file of the same content; False, and nothing done, without one.

    What that file holds now counts, not what its record says: it is read once more.
    """
    same = shared.get((digest, nbytes))
    if same is None or same.parent.is_symlink():
        return False
    temp = temp_path(path)
    try:
        os.link(same, temp, follow_symlinks=False)  # from here on nobody can take it away
        if temp.is_symlink() or _sha256(temp) != digest:
            log.warning("%s: is no longer what was published; not linked to", same)
            return False
        os.replace(temp, path)
        return True
    except OSError as e:  # removed meanwhile, no links here, too many: a file of its own is as good
        log.info("%s: no link to %s: %s", path, same, e)
        return False
    finally:
        with suppress(OSError):
            temp.unlink()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(16 << 20):
            digest.update(block)
    return digest.hexdigest()

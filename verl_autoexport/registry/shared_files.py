"""Files that several versions share: one copy on disk, with hard links."""

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
"""sha256 (hex) and bytes -> a file of an earlier version whose record gives these."""
log = logging.getLogger(__name__)


def find_shared(versions: Iterable[Version]) -> dict[tuple[str, int], Path]:
    """The files of all versions; the newest version wins, since it is the least likely to be removed soon."""
    found = {}
    for version in sorted(versions, key=lambda v: v.number):
        for file in version.record.files:
            name, size, digest = (file.get(key) for key in ("name", "bytes", "sha256"))
            if is_plain_name(name) and isinstance(size, int) and size >= MIN_BYTES and isinstance(digest, str):
                found[digest, size] = version.path / name
    return found


def link_shared(path: Path, digest: str, nbytes: int, shared: SharedFiles) -> bool:
    """Replaces `path` by a link to an earlier version's file of the same content; False, without a change, if none has.

    The earlier file is read once more: its present content counts, not its record.
    """
    same = shared.get((digest, nbytes))
    if same is None or same.parent.is_symlink():
        return False
    temp = temp_path(path)
    try:
        os.link(same, temp, follow_symlinks=False)  # from here on no removal can take it away
        if temp.is_symlink() or _sha256(temp) != digest:
            log.warning("%s: differs from the published file, so it is not linked to", same)
            return False
        os.replace(temp, path)
        return True
    except OSError as e:  # removed since, links unsupported, or too many: a separate file is as good
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

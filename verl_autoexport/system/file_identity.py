"""The identity of files without reading them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from verl_autoexport.errors import SourceError

Stat = tuple[str, int, int, int]
"""Name, inode, size and mtime (ns) of a file."""


def stats(paths: Sequence[Path]) -> list[Stat]:
    """The identities of these files; raises SourceError if one is gone."""
    try:
        return [(p.name, s.st_ino, s.st_size, s.st_mtime_ns) for p in paths for s in (os.stat(p),)]
    except OSError as e:
        raise SourceError(f"{e.filename}: {e.strerror}; the checkpoint was removed while it was being used.") from e

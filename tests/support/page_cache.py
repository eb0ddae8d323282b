"""How much of a file the page cache holds."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def resident(path: Path) -> float:
    """The share of a file's pages that is in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), pages)
        del first  # else it cannot be unmapped
    assert not failed
    return sum(page & 1 for page in pages) / len(pages)

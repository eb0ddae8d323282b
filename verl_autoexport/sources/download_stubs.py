"""Files that a download left in place of the real ones: Git-LFS pointers, web pages, empty files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from verl_autoexport.errors import SourceError

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype html", b"<html")
_LARGEST = 4 << 20  # bytes; pointers and pages are smaller
_READ = (".safetensors", ".pt", ".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
_NEVER_EMPTY = (".safetensors", "config.json", "tokenizer.json", "tokenizer.model")


def check_fetched(paths: Iterable[Path]) -> None:
    """Raises SourceError naming the first mere stub among `paths`, the files that an export reads."""
    for path in paths:
        if path.name.endswith(_READ) and (problem := _problem(path)):
            raise SourceError(f"{path}: {problem}")


def _problem(path: Path) -> str | None:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST:
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            head = os.read(fd, 512)
        finally:
            os.close(fd)
    except OSError:
        return None
    if head.startswith(_POINTER):
        return "a Git-LFS pointer, not the file itself; run `git lfs pull` in its repository."
    if head.lstrip().lower().startswith(_PAGE):
        return "a web page, not the file that its name announces: the download failed (no access?); fetch it again."
    if not head and path.name.endswith(_NEVER_EMPTY):
        return "empty (0 bytes); it was not copied or downloaded whole; fetch it again."
    return None

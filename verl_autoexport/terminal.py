"""What a person sees of the command line: a bar while it works, tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from verl_autoexport.untrusted import shown


class Bar:
    """The stages on a terminal: a bar where bytes are counted, else a line. Silent when stderr is no terminal."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def stage(self, name: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self.__exit__()
        form = None if total else "{desc}"
        self.bar = tqdm(
            desc=name, total=total, unit="B", unit_scale=True, bar_format=form, leave=False, disable=None,
            ncols=_width(), nrows=24,
        )  # fmt: skip

    def advance(self, nbytes: int) -> None:
        self.bar.update(nbytes)


def _width() -> int:
    """Columns; a terminal without a size (`script`, some of CI) says 0, and tqdm would then show nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; no cell can break out of its line."""
    lines = [[shown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

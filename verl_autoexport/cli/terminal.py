"""The output of the command line: a progress bar, tables and errors; it works even with closed streams."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from verl_autoexport.errors import shown


class Bar:
    """The stages on a terminal: a bar while bytes are counted, otherwise a line. Silent if stderr is no terminal."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()

    def stage(self, name: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self.__exit__()
        form = None if total else "{desc}"
        with suppress(OSError):  # the terminal is gone, so nobody watches
            self.bar = tqdm(
                desc=name, total=total, unit="B", unit_scale=True, bar_format=form, leave=False, disable=None,
                ncols=_width(), nrows=24,
            )  # fmt: skip

    def advance(self, nbytes: int) -> None:
        with suppress(OSError):
            self.bar.update(nbytes)


def _width() -> int:
    """The number of columns; a terminal without a size (`script`, some of CI) reports 0, where tqdm shows nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as needed; no cell can break out of its line."""
    lines = [[shown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def open_streams() -> None:
    """Replaces closed standard streams by a file each; otherwise the next opened file would become stdout or stderr.

    `sys.stdout` stays None if it was closed, so that `write_out` can report that.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    if sys.stderr is None:  # otherwise `print` would take stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def collected() -> Iterator[Callable[[], str]]:
    """Collects the text printed inside, which the yielded function returns, so that only one write can fail."""
    with redirect_stdout(io.StringIO()) as text:
        yield text.getvalue


def write_out(text: str) -> bool:
    """Writes to stdout, escaping characters outside its encoding; on failure a line on stderr, and False.

    A closed pipe is not reported, since its reader knows.
    """
    if not text:
        return True
    try:
        if sys.stdout is None:
            raise OSError(None, "it is closed")
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as e:
        if not isinstance(e, BrokenPipeError):
            complain(f"standard output: cannot be written to: {e.strerror}")
        if sys.stdout is not None:  # a remaining buffer would fail again at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def complain(message: str) -> None:
    """Prints one line on stderr, whatever the message contains; nothing if stderr is closed."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    try:
        print(f"verl-autoexport: {line}", file=sys.stderr, flush=True)
    except OSError:  # a remaining buffer would fail again at the end of the process, and change the exit code
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

"""What a person sees of the command line: a bar while it works, tables, errors; whatever has become of the streams."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from verl_autoexport.errors import shown


class Bar:
    """The stages on a terminal: a bar where bytes are counted, else a line. Silent when stderr is no terminal."""

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
        with suppress(OSError):  # the terminal is gone: nobody watches
            self.bar = tqdm(
                desc=name, total=total, unit="B", unit_scale=True, bar_format=form, leave=False, disable=None,
                ncols=_width(), nrows=24,
            )  # fmt: skip

    def advance(self, nbytes: int) -> None:
        with suppress(OSError):
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


def open_streams() -> None:
    """Give closed standard streams a file each: else the next file that is opened, a model's say, is stdout or stderr.

    `sys.stdout` stays None where it was closed, so that `write_out` can say so.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if sys.stderr is None:  # `print` would take stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def collected() -> Iterator[Callable[[], str]]:
    """What is printed inside is kept, and had by the call; one place writes it, and one can fail."""
    with redirect_stdout(io.StringIO()) as text:
        yield text.getvalue


def write_out(text: str) -> bool:
    """Write to stdout, escaping what it cannot say; where that cannot be, a line on stderr says why, and it is False.

    Nobody is told that a pipe is closed: who read from it knows.
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
        if sys.stdout is not None:  # what is left in its buffer would fail again at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds; nothing where there is no stderr any more."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    try:
        print(f"verl-autoexport: {line}", file=sys.stderr, flush=True)
    except OSError:  # what is left in its buffer would fail again, and change the exit code, at the end of the process
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

"""The journal as one process knows it: read once, and later only the added lines."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import journal
from verl_autoexport.registry.state import Facts

WORTH = 1000
"""The number of void lines that makes a journal worth shortening, if they are half of all."""
_TAIL = 64


class Notes:
    """The entries of a journal. Reading costs little when little was added; any thread may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.worth_a_look = WORTH
        self._forget()

    @property
    def lines(self) -> int:
        """The number of lines at the last reading."""
        return self._lines

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All valid entries in order, and one message for each skipped line."""
        with self._lock:
            torn = self._take_in()
            return self._entries[:], self._problems + torn

    def facts(self) -> Facts:
        """The sum of all entries; callers only read it, one thread at a time (the one that has the lock)."""
        with self._lock:
            self._take_in()
            return self._facts

    def append(self, event: str, fields: dict[str, Any]) -> None:
        """Adds one durable line; the caller holds the registry's lock."""
        journal.append(self.path, event, fields)

    def append_all(self, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Adds the entries in one durable write; after a crash only the first ones may be there."""
        journal.append_all(self.path, entries)

    def _forget(self) -> None:
        self._entries: list[dict[str, Any]] = []
        self._problems: list[str] = []
        self._facts = Facts()
        self._inode, self._offset, self._lines, self._tail = 0, 0, 0, b""

    def _take_in(self) -> list[str]:
        """Continues where the last reading stopped; returns the problems of an incomplete last line."""
        try:
            with open(self.path, "rb") as file:
                if not self._is_known(file):
                    self._forget()
                    self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._offset)
                return self._take(file.read())
        except FileNotFoundError:
            self._forget()
            return []
        except OSError as e:
            raise RegistryError(f"{self.path}: the journal cannot be read: {e}") from e

    def _is_known(self, file: Any) -> bool:
        """Whether `file` is the one that was read before; another file may have its inode's number by now."""
        info = os.fstat(file.fileno())
        if info.st_ino != self._inode or info.st_size < self._offset:
            return False
        return os.pread(file.fileno(), len(self._tail), self._offset - len(self._tail)) == self._tail

    def _take(self, raw: bytes) -> list[str]:
        lines = raw.split(b"\n")
        torn = lines.pop()
        taken = len(raw) - len(torn)
        for line in lines:
            self._take_line(line)
        if torn and journal.parse(torn) is not None:
            self._take_line(torn)
            self._lines -= 1  # the next append ends this line first
            taken, torn = len(raw), b""
        self._offset += taken
        self._tail = (self._tail + raw[max(0, taken - _TAIL) : taken])[-_TAIL:]
        return [journal.damage(self.path, self._lines + 1, torn)] if torn else []

    def _take_line(self, line: bytes) -> None:
        self._lines += 1
        if not line:
            return
        if (entry := journal.parse(line)) is None:
            self._problems.append(journal.damage(self.path, self._lines, line))
        else:
            self._entries.append(entry)
            self._facts.take(entry)

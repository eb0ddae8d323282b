"""Journal entries on their way: what another process's lock holds up is written later, in order, with its own time."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from verl_autoexport.registry.store import Registry


class Bookings:
    """Any thread may add; `write` raises RegistryError or OSError, and then everything still waits."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.waiting: deque[tuple[str, dict[str, Any]]] = deque()
        self._writing = threading.Lock()

    def add(self, event: str, **fields: Any) -> None:
        self.waiting.append((event, {"time": time.time(), **fields}))

    def write(self) -> None:
        with self._writing:
            entries = list(self.waiting)
            self.registry.note(entries)
            for _ in entries:
                self.waiting.popleft()

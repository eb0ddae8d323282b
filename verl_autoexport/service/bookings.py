"""Journal entries that wait while another process holds the registry's lock; each keeps its own time and its order."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from verl_autoexport.registry.store import Registry


class Bookings:
    """Entries from any thread, written together; if `write` raises RegistryError or OSError, they all still wait."""

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

"""Requests for a milestone, as the run sees them: each is used for one export, and none is lost on the way."""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path

from verl_autoexport.errors import AutoExportError
from verl_autoexport.registry import requests
from verl_autoexport.system.deadlines import start

logger = logging.getLogger(__name__)


class Asked:
    """Folders of requests that `look` took away, until the actor is asked for the step that they led to.

    Taking is one rename, so a request that comes later is in nobody's way and waits for the next step.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / requests.NAME
        self.open: list[Path] | None = None  # None: not looked for yet
        self.steps: dict[Path, int] = {}

    def look(self) -> bool:
        """Whether someone asked and has no export yet."""
        try:
            if self.open is None:  # taken by a run that ended before it could export
                self.open = requests.taken(self.folder)
            if (taken := requests.take(self.folder)) is not None:
                self.open.append(taken)
        except (AutoExportError, OSError) as e:
            logger.warning("verl_autoexport: %s", e)
        return bool(self.open)

    def taken_by(self, step: int) -> None:
        """What was found so far is answered by `step`."""
        self.steps |= dict.fromkeys(self.open or (), step)
        self.open = []

    def settle(self, unsent: Container[int]) -> None:
        """Delete, in the background, what led to exports that the actor knows of."""
        for folder in [f for f, step in self.steps.items() if step not in unsent]:
            del self.steps[folder]
            try:
                start(requests.delete, requests.finish(folder))
            except (AutoExportError, OSError) as e:
                logger.warning("verl_autoexport: %s", e)

"""Requests for a milestone, as the run sees them: each leads to one export, and none gets lost."""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path

from verl_autoexport.errors import AutoExportError
from verl_autoexport.registry import requests
from verl_autoexport.system.deadlines import start

logger = logging.getLogger(__name__)


class Asked:
    """Request folders that `look` took, kept until the actor knows the step that answers them.

    `look` takes a folder with one rename, so a later request is undisturbed and waits for the next step.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / requests.NAME
        self.open: list[Path] | None = None  # None: `look` has not run yet
        self.steps: dict[Path, int] = {}

    def look(self) -> bool:
        """Whether a request has no export yet."""
        try:
            if self.open is None:  # requests that an earlier run took and did not export
                self.open = requests.taken(self.folder)
            if (taken := requests.take(self.folder)) is not None:
                self.open.append(taken)
        except (AutoExportError, OSError) as e:
            logger.warning("verl_autoexport: %s", e)
        return bool(self.open)

    def taken_by(self, step: int) -> None:
        """The step answers all requests found so far."""
        self.steps |= dict.fromkeys(self.open or (), step)
        self.open = []

    def settle(self, unsent: Container[int]) -> None:
        """Deletes, in the background, the requests whose exports the actor knows."""
        for folder in [f for f, step in self.steps.items() if step not in unsent]:
            del self.steps[folder]
            try:
                start(requests.delete, requests.finish(folder))
            except (AutoExportError, OSError) as e:
                logger.warning("verl_autoexport: %s", e)

"""This package's log lines in foreign processes: they go to the same place as the trainer's, from INFO on."""

from __future__ import annotations

import logging


def show_info() -> None:
    """Enables INFO lines of this package, and prints them if no other handler exists; may be called again."""
    logger = logging.getLogger("verl_autoexport")
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())

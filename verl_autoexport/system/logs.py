"""This package's log lines in processes that others started: they go where those of the trainer go, from INFO on."""

from __future__ import annotations

import logging


def show_info() -> None:
    """Let INFO lines of this package through, and print them where nobody else handles any; may be called again."""
    logger = logging.getLogger("verl_autoexport")
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())

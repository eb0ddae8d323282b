"""The seam for merging: the place where jobs run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from verl_autoexport.merge.job import MergeJob, WrittenFile


class MergeRunner(Protocol):
    """Runs merge jobs; `progress` gets the bytes written, or 0 as a sign of life, and may raise."""

    def run(self, jobs: Sequence[MergeJob], progress: Callable[[int], None]) -> list[WrittenFile]: ...

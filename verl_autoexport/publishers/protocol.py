"""The seam for publishers: they bring a published version to another place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from verl_autoexport.registry.versions import Version


@dataclass(frozen=True)
class Receipt:
    """A version, by its name, arrived: `where` is the address at which others find it."""

    publisher: str
    version: str
    where: str


class Publisher(Protocol):
    """Delivers versions, one at a time. What it publishes again is as if it had been published once."""

    @property
    def name(self) -> str:
        """Its name in the journal and the log."""
        ...

    def publish(self, version: Version) -> Receipt:
        """Raises PublishError, with the reason, where the version did not arrive whole."""
        ...


GROUP = "verl_autoexport.publishers"
"""The entry points with which other packages bring publishers; the exporter calls each after every publication."""

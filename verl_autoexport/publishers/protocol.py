"""The seam for publishers: they bring a published version to another place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from verl_autoexport.registry.versions import Version


@dataclass(frozen=True)
class Receipt:
    """The proof that a version, by its name, arrived; `where` is the address at which others find it."""

    publisher: str
    version: str
    where: str


class Publisher(Protocol):
    """A receiver of versions, one at a time; publishing a version again has no further effect."""

    @property
    def name(self) -> str:
        """The publisher's name in the journal and the log."""
        ...

    def publish(self, version: Version) -> Receipt:
        """Publishes the version; raises PublishError, with the reason, if it did not arrive whole."""
        ...


GROUP = "verl_autoexport.publishers"
"""The entry points through which other packages add publishers; the exporter calls each after every publication."""

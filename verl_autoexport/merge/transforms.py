"""Changes of values on their way to disk: the seam for making one tensor of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Transform(Protocol):
    """A change of one whole source tensor, before it is cast or cut; pickled for the process that merges.

    Its memory comes on top of the merge's budget.
    """

    @property
    def sources(self) -> tuple[str, ...]:
        """The names in the manifest of the other tensors that it reads."""
        ...

    def apply(self, tensor: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        """The changed tensor, in the shape and dtype of `tensor`, which stays unchanged; `sources` as listed."""
        ...

    def has_effect(self, *sources: torch.Tensor) -> bool:
        """Whether, with these `sources`, some value should differ; the record says if none does after the cast."""
        ...

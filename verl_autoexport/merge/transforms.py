"""Changing values on their way to disk: the seam for whatever makes one tensor of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Transform(Protocol):
    """A change of one source tensor, as a whole and before it is cast or cut; pickled to where the merge runs.

    The memory that it takes is beyond the merge's budget.
    """

    @property
    def sources(self) -> tuple[str, ...]:
        """The other tensors that it reads, by their names in the manifest."""
        ...

    def apply(self, tensor: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        """The changed tensor, in the shape and dtype of `tensor`, which stays as it is; `sources` as listed."""
        ...

    def has_effect(self, *sources: torch.Tensor) -> bool:
        """Whether by `sources` some value should differ; the record says where none does after the cast."""
        ...

"""Values that a trainer may log and that are no numbers."""

from __future__ import annotations

import numpy as np
import torch


class Odd:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error("odd")

    __str__ = __float__

    def __hash__(self) -> int:
        return 1


class Panic(BaseException):
    """As some native extensions raise it."""


class Shifty:
    @property
    def __class__(self) -> type:
        raise RuntimeError("odd")


ODD = [
    10**400, Odd(RuntimeError), Odd(Panic), torch.empty(1, device="meta"), torch.zeros(3), np.zeros(4), 1j, True, "0.5",
    None, {}, np.array("x"), np.bool_(True),
]  # fmt: skip

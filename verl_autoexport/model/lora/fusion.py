"""LoRA fused into a weight with the operations of PEFT's `merge` on a CPU, so that the bits are the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fusion:
    """LoRA to add to a source tensor, in its own dtype: a `Transform`.

    `kind`: `linear`, `embedding` or `bias` (then `a` is None). `a`, `b` and `magnitude`
    (DoRA) name tensors of the manifest; `transposed`: the weight is stored as (in, out).
    """

    kind: str
    a: str | None
    b: str
    scaling: float
    magnitude: str | None = None
    transposed: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(fqn for fqn in (self.b, self.a, self.magnitude) if fqn is not None)

    def has_effect(self, *sources: torch.Tensor) -> bool:
        return bool(sources[0].any())

    def apply(self, tensor: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        b, *others = sources
        if self.a is None:
            return tensor.clone().add_(b * self.scaling)
        a, *magnitude = others
        half = b.dtype in (torch.float16, torch.bfloat16)
        delta = b.float() @ a.float() if half else b @ a
        flipped = self.transposed or self.kind == "embedding"
        delta = (delta.T if flipped else delta) * self.scaling
        delta = delta.to(b.dtype) if half else delta
        if not magnitude:
            return tensor.clone().add_(delta)
        summed = (tensor.T + delta.T) if flipped else (tensor + delta)
        norm = torch.linalg.norm(summed, dim=1).to(summed.dtype)
        factor = (magnitude[0] / norm).view((1, -1) if flipped else (-1, 1))
        return (factor * (tensor + delta)).to(tensor.dtype)

"""A planned output put together in memory."""

from __future__ import annotations

import torch

from verl_autoexport.merge.plan import Output

Tensors = dict[str, torch.Tensor]


def put_together(output: Output, sources: Tensors) -> torch.Tensor:
    """The output's values, by its pieces."""
    made = torch.full(output.shape, -1, dtype=sources[output.pieces[0].fqn].dtype)
    for piece in output.pieces:
        box = sources[piece.fqn][tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))]
        if piece.dims is None:
            return box.reshape(output.shape)
        named = [d for d in piece.dims if d is not None]
        box = box.permute(*named, *(d for d in range(box.ndim) if d not in named)).reshape(piece.extent)
        made[tuple(slice(o, o + n) for o, n in zip(piece.at, piece.extent, strict=True))] = box
    return made

"""Weights of well-known capsule layers, turned into ours."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = {
    "route_weights": ("J", "I", "D", "E"),
    "dense_capsule": ("J", "I", "E", "D"),
    "einsum": ("I", "J", "E", "D"),
}
"""The dimensions of each known layout; ours is I, J, D, E."""


def convert_weight(tensor: Tensor, layout: str) -> Tensor:
    """Turn a dense capsule layer's weight into that of `CapsuleLayer`, [I, J, D, E].

    Args:
        tensor: the weight, four-dimensional.
        layout: "route_weights" [J, I, D, E], a vector on the left of the matrix (the 2017 code and its model);
            "dense_capsule" [J, I, E, D], a vector on the right of it; "einsum" [I, J, E, D].

    Returns:
        A contiguous copy [I, J, D, E], detached, of the tensor's dtype and device.

    Raises:
        ValueError: an unknown layout, or a tensor that is not four-dimensional.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if tensor.dim() != 4:
        raise ValueError(f"tensor must have shape [{', '.join(LAYOUTS[layout])}], got {list(tensor.shape)}")
    order = [LAYOUTS[layout].index(symbol) for symbol in ("I", "J", "D", "E")]
    return tensor.detach().permute(order).clone(memory_format=torch.contiguous_format)

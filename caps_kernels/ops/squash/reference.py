"""squash and its gradient in plain PyTorch: the specification.

Both are written in polar form. With the length r = |s|, the direction n = s / r and q = min(r, 1/r):

    v      = n · r² / (1 + r²)
    grad_s = grad_v · q / (1 + q²)  ±  n (n · grad_v) · q (1 - q²) / (1 + q²)²      (+ for r ≤ 1, - beyond)

No term of either overflows, and all vanish at s = 0. r itself may overflow to inf, and then q is 0, its limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caps_kernels.ops.precision import accumulate


def forward(s: Tensor, dim: int) -> tuple[Tensor]:
    """v [...] from s [...]; lengths are taken along `dim`."""
    direction, q, inside = _polar(accumulate(s), dim)
    q2 = q * q  # [..., 1, ...]
    length = torch.where(inside, q2, 1.0) / (1 + q2)  # [..., 1, ...], r² / (1 + r²)
    return ((direction * length).to(s.dtype),)


def backward(grad_v: Tensor, s: Tensor, dim: int) -> tuple[Tensor]:
    """grad_s [...] from grad_v [...] and s [...]."""
    direction, q, inside = _polar(accumulate(s), dim)
    grad = accumulate(grad_v)  # [...]
    across = q / (1 + q * q)  # [..., 1, ...], |v| / r
    along = across * (1 - q * q) / (1 + q * q)  # [..., 1, ...], r times the derivative of |v| / r
    along = torch.where(inside, along, -along)
    radial = (direction * grad).sum(dim, keepdim=True)  # [..., 1, ...]
    return ((across * grad + along * radial * direction).to(s.dtype),)


def _polar(s: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The direction s / |s| [...], q = min(|s|, 1 / |s|) [..., 1, ...] and whether |s| ≤ 1.

    Lengths are taken of s / max|s_e|, between 1 and √E, so that no square leaves the dtype's range. The scale cancels
    from every result, so its own gradient is left out, which keeps second derivatives finite.
    """
    scale = s.detach().abs().amax(dim, keepdim=True)  # [..., 1, ...]
    scaled = s / torch.where(scale > 0, scale, 1.0)  # [...]
    square = (scaled * scaled).sum(dim, keepdim=True)  # [..., 1, ...]
    norm = torch.where(square > 0, square, 1.0).sqrt()  # [..., 1, ...], 1 in place of 0
    direction = scaled / norm  # [...]
    length = scale * norm  # [..., 1, ...]
    inside = length <= 1
    return direction, torch.where(inside, length, 1 / torch.where(inside, 1.0, length)), inside

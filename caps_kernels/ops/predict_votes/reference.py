"""predict_votes and its gradients in plain PyTorch: the specification.

The weight of input capsule i is that of its type t = i // P, so I is split into T types of P positions each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caps_kernels.ops.precision import accumulate


def forward(u: Tensor, weight: Tensor, positions: int) -> tuple[Tensor]:
    """votes [B, I, J, E] from u [B, I, D] and weight [T, J, D, E]."""
    return (forward_accumulated(u, weight, positions).to(u.dtype),)


def forward_accumulated(u: Tensor, weight: Tensor, positions: int) -> Tensor:
    """The votes before they are rounded to the inputs' dtype; float32 for 16-bit inputs."""
    u = accumulate(u).unflatten(1, (-1, positions))  # [B, T, P, D]
    votes = torch.einsum("btpd,tjde->btpje", u, accumulate(weight))  # [B, T, P, J, E]
    return votes.flatten(1, 2)  # [B, I, J, E]


def backward(grad_votes: Tensor, u: Tensor, weight: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """grad_u [B, I, D] and grad_weight [T, J, D, E] from grad_votes [B, I, J, E]."""
    grad = accumulate(grad_votes).unflatten(1, (-1, positions))  # [B, T, P, J, E]
    inputs = accumulate(u).unflatten(1, (-1, positions))  # [B, T, P, D]
    grad_u = torch.einsum("btpje,tjde->btpd", grad, accumulate(weight))  # [B, T, P, D]
    grad_weight = torch.einsum("btpje,btpd->tjde", grad, inputs)  # [T, J, D, E]
    return grad_u.flatten(1, 2).to(u.dtype), grad_weight.to(weight.dtype)

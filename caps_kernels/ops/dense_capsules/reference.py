"""dense_capsules and its gradients in plain PyTorch: predict the votes, then route them. The specification."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from caps_kernels.ops.dynamic_routing import reference as dynamic_routing
from caps_kernels.ops.predict_votes import reference as predict_votes


def forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, positions: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    votes = predict_votes.forward_accumulated(u, weight, positions)  # [B, I, J, E]
    v, s, coupling = dynamic_routing.forward(votes, bias, *options)
    return v.to(u.dtype), s, coupling.to(u.dtype)


def backward(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    positions: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_u [B, I, D], grad_weight [T, J, D, E] and grad_bias [J, E] (empty where there is no bias)."""
    votes = predict_votes.forward_accumulated(u, weight, positions)  # [B, I, J, E]
    grad_votes, grad_bias = dynamic_routing.backward(grad_v, votes, bias, s, *options)
    grad_u, grad_weight = predict_votes.backward(grad_votes, u, weight, positions)
    return grad_u, grad_weight, grad_bias.to(u.dtype)

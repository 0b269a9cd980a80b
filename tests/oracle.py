"""The mathematics of the ops once more, as loops over single numbers and vectors: what the reference is held against.

Nothing here is batched or fused, and gradients come from autograd through these very lines, so that an error in the
reference's einsums or in its hand-derived backward has nowhere to hide. Use it in float64 on tiny inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squash(s: Tensor, dim: int = -1) -> Tensor:
    """v = |s|² / (1 + |s|²) · s / |s|."""
    norm = s.square().sum(dim, keepdim=True).sqrt()
    return norm.square() / (1 + norm.square()) * s / norm


def predict_votes(u: Tensor, weight: Tensor, positions: int = 1) -> Tensor:
    """û_ij = u_i W_tj with t = i // P."""
    batch, in_capsules, _ = u.shape
    rows = [
        torch.stack(
            [
                torch.stack([u[b, i] @ weight[i // positions, j] for j in range(weight.shape[1])])
                for i in range(in_capsules)
            ]
        )
        for b in range(batch)
    ]
    return torch.stack(rows) if rows else u.new_empty(0, in_capsules, weight.shape[1], weight.shape[3])


def dynamic_routing(
    votes: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: bool = False,
) -> Any:
    """Procedure 1 of the paper, one sample after the other."""
    samples = [_route(votes[b], bias, iterations, leaky, routing_grad) for b in range(votes.shape[0])]
    if not samples:
        v, coupling = votes.new_empty(0, *votes.shape[2:]), votes.new_empty(0, *votes.shape[1:3])
    else:
        v, coupling = (torch.stack(column) for column in zip(*samples, strict=True))
    return (v, coupling.detach()) if return_coupling else v


def _route(
    votes: Tensor, bias: Tensor | None, iterations: int, leaky: bool, routing_grad: str
) -> tuple[Tensor, Tensor]:
    in_capsules, out_capsules, _ = votes.shape
    logits = [[votes.new_zeros(()) for _ in range(out_capsules)] for _ in range(in_capsules)]
    for iteration in range(iterations):
        rows = []
        for row in logits:
            weights = torch.stack(row).exp()
            rows.append(weights / (weights.sum() + (1 if leaky else 0)))
        coupling = torch.stack(rows)
        if routing_grad == "last":
            coupling = coupling.detach()
        v = []
        for j in range(out_capsules):
            s = sum((coupling[i, j] * votes[i, j] for i in range(in_capsules)), votes.new_zeros(votes.shape[2]))
            v.append(squash(s if bias is None else s + bias[j]))
        if iteration < iterations - 1:
            logits = [[logits[i][j] + votes[i, j] @ v[j] for j in range(out_capsules)] for i in range(in_capsules)]
    return torch.stack(v), coupling


def dense_capsules(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, iterations: int = 3, positions: int = 1, **options: Any
) -> Any:
    """Votes, then routing."""
    return dynamic_routing(predict_votes(u, weight, positions), bias, iterations, **options)

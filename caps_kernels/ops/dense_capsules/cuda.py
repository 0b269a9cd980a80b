"""dense_capsules on backend "cuda": csrc/cuda/dense_capsules.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from caps_kernels.backends import Implementation

Results = tuple[Tensor, Tensor, Tensor]


def forward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: int,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> Results:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    results: Results = torch.ops.caps_kernels_cuda.dense_capsules_fwd(
        u, weight, bias, positions, iterations, leaky, return_coupling
    )
    return results


def backward(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    positions: int,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> Results:
    """grad_u [B, I, D], grad_weight [T, J, D, E] and grad_bias [J, E] (empty where there is no bias)."""
    gradients: Results = torch.ops.caps_kernels_cuda.dense_capsules_bwd(
        grad_v, u, weight, bias, s, positions, iterations, leaky, routing_grad == "last"
    )
    return gradients


def regime(u: Tensor, weight: Tensor, bias: Tensor | None, positions: int, iterations: int, *_: object) -> str:
    """How a call would run: the tile of csrc/include/caps/gpu_dense_plan.h, and the launches of forward."""
    plan = torch.ops.caps_kernels_cuda.dense_capsules_plan(u, weight, positions, iterations)
    samples, parents, numbers, tensor_cores, one_launch = plan[:5]
    if numbers == 0:
        tile = "plain: a sample a warp"
    else:
        product = "tensor cores" if tensor_cores else "FMA"
        tile = f"tiles of {samples} samples for J up to {parents} and E up to {numbers}, products by {product}"
    return f"{tile}; {'one cooperative launch' if one_launch else 'two launches an iteration'}"


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

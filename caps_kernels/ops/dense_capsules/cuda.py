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


TILES = ((10, 16), (64, 16), (10, 32))
"""The largest J and E of each tile of csrc/include/caps/gpu_dense_plan.h."""
TILES_OF_FLOAT64 = ((16, 16),)


def slow(u: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why u [B, I, D] and weight [T, J, D, E] would run in the plain kernels, or None: with J = 128 these took nine
    times as long as einsum on an H100 (bench/results).
    """
    out_capsules, out_dim = weight.shape[1], weight.shape[3]
    tiles = TILES_OF_FLOAT64 if u.dtype == torch.float64 else TILES
    if any(out_capsules <= parents and out_dim <= numbers for parents, numbers in tiles):
        return None
    return f"no tile holds J={out_capsules} and E={out_dim}, and its plain kernels are slow"


IMPLEMENTATION = Implementation(forward, backward, regime=regime, slow=slow)

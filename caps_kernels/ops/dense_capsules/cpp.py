"""dense_capsules on backend "cpp": csrc/cpu/dense_capsules.cpp."""

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
    results: Results = torch.ops.caps_kernels_cpp.dense_capsules_fwd(
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
    gradients: Results = torch.ops.caps_kernels_cpp.dense_capsules_bwd(
        grad_v, u, weight, bias, s, positions, iterations, leaky, routing_grad == "last"
    )
    return gradients


REGIMES = (
    "rows: few samples, û computed once and kept",
    "quads: û of a few samples at a time computed once and kept",
    "tiles: samples in SIMD lanes, û computed again in every pass",
    "tiles, one lower capsule at a time: samples in SIMD lanes, û computed again in every pass",
)


def regime(u: Tensor, weight: Tensor, bias: Tensor | None, positions: int, iterations: int, *_: object) -> str:
    """How forward and backward of a call would run: csrc/cpu/dense_capsules.cpp describes the regimes."""
    told: int = torch.ops.caps_kernels_cpp.dense_capsules_regime(u, weight, positions, iterations)
    forward, backward, again = told // 100, told // 10 % 10, told % 10
    other = REGIMES[backward] + ", " if backward != forward else ""
    return f"{REGIMES[forward]}; backward: {other}coefficients {'computed again' if again else 'kept'}"


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

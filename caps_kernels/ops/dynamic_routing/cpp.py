"""dynamic_routing on backend "cpp": csrc/cpu/dynamic_routing.cpp.

Regimes: "samples" gives each thread whole samples, whose votes stay in its cache; "split" has all threads share an
iteration of all samples, where these are few or too large for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caps_kernels.backends import Implementation
from caps_kernels.ops.precision import accumulation_dtype

SMALL = 1 << 20
"""Votes of so many bytes in all are not worth sharing."""
CACHED = 4 << 20
"""A sample's votes of more bytes are in no cache from one iteration to the next."""
REMEMBERED = 16 << 20
"""Backward keeps coefficients of up to so many bytes (a sample of a thread, or all that are split) for its last pass,
and computes them again beyond it."""


def regime(votes: Tensor, *_: Any) -> str:
    """How the votes [B, I, J, E] are divided among threads; it depends on their shape and dtype alone."""
    batch = votes.shape[0]
    total = votes.numel() * accumulation_dtype(votes.dtype).itemsize
    few = 16 if total <= CACHED * batch else 256
    return "split" if total > SMALL and batch < few else "samples"


def forward(
    votes: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, ...]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    split = regime(votes) == "split"
    results: tuple[Tensor, ...] = torch.ops.caps_kernels_cpp.dynamic_routing_fwd(
        votes, bias, iterations, leaky, return_coupling, split
    )
    return results


def backward(
    grad_v: Tensor,
    votes: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, ...]:
    """grad_votes [B, I, J, E] and grad_bias [J, E] (empty where there is no bias)."""
    split = regime(votes) == "split"
    batch, in_capsules, out_capsules, _ = votes.shape
    kept = 2 * (iterations - 1) * (batch if split else 1) * in_capsules * out_capsules * s.element_size()
    results: tuple[Tensor, ...] = torch.ops.caps_kernels_cpp.dynamic_routing_bwd(
        grad_v, votes, bias, s, iterations, leaky, routing_grad == "last", split, kept <= REMEMBERED
    )
    return results


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

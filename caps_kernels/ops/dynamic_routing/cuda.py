"""dynamic_routing on backend "cuda": csrc/cuda/dynamic_routing.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caps_kernels.backends import Implementation

CHUNKS = 1024
"""Samples are split into chunks where there are fewer of them than this; kManyChunks in the source."""


def regime(votes: Tensor, *_: Any) -> str:
    """How the votes [B, I, J, E] are divided among blocks; it depends on their shape alone."""
    batch, in_capsules = votes.shape[:2]
    if batch >= CHUNKS or in_capsules == 1:
        return "samples: one launch, a block for each sample"
    return "split: one cooperative launch, blocks share samples"


def forward(
    votes: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, ...]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    results: tuple[Tensor, ...] = torch.ops.caps_kernels_cuda.dynamic_routing_fwd(
        votes, bias, iterations, leaky, return_coupling
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
    results: tuple[Tensor, ...] = torch.ops.caps_kernels_cuda.dynamic_routing_bwd(
        grad_v, votes, bias, s, iterations, leaky, routing_grad == "last"
    )
    return results


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

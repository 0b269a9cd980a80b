"""dynamic_routing on backend "cuda": csrc/cuda/dynamic_routing.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caps_kernels.backends import Implementation

CHUNKS = 1024
"""Samples are split into chunks where there are fewer of them than this; kManyChunks in the source."""

TEAMS = {8: ((16, 5),), 4: ((8, 5), (32, 5), (32, 8)), 2: ((8, 3), (32, 4))}
"""By the bytes of a number, lanes of a lower capsule and packs of 16 bytes of each, where registers hold its votes;
Team in the source."""


def in_registers(votes: Tensor) -> bool:
    """Whether registers hold the votes of a lower capsule: they lie side by side, in packs, a power of 2 for each
    higher capsule.
    """
    batch, in_capsules, out_capsules, out_dim = votes.shape
    size = votes.element_size()
    packs = out_dim * size // 16
    aligned = all(
        step * size % 16 == 0 for step, count in zip(votes.stride()[:2], votes.shape[:2], strict=True) if count > 1
    )
    side_by_side = votes.stride(3) == 1 and (out_capsules == 1 or votes.stride(2) == out_dim)
    if out_dim * size % 16 != 0 or votes.data_ptr() % 16 != 0 or not aligned or not side_by_side:
        return False
    if packs & (packs - 1) != 0 or batch * in_capsules >= 2**31:
        return False
    return any(packs <= lanes and out_capsules * packs <= lanes * each for lanes, each in TEAMS[size])


def regime(votes: Tensor, *_: Any) -> str:
    """How the votes [B, I, J, E] are divided; it depends on their shape and strides alone."""
    batch, in_capsules = votes.shape[:2]
    if in_registers(votes):
        return "registers: one cooperative launch, a warp for each chunk of a sample"
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

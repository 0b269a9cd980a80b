"""predict_votes on backend "cuda": csrc/cuda/predict_votes.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from caps_kernels.backends import Implementation


def forward(u: Tensor, weight: Tensor, positions: int) -> tuple[Tensor]:
    """votes [B, I, J, E] from u [B, I, D] and weight [T, J, D, E]."""
    return (torch.ops.caps_kernels_cuda.predict_votes_fwd(u, weight, positions),)


def backward(grad_votes: Tensor, u: Tensor, weight: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """grad_u [B, I, D] and grad_weight [T, J, D, E] from grad_votes [B, I, J, E]."""
    grad_u, grad_weight = torch.ops.caps_kernels_cuda.predict_votes_bwd(grad_votes, u, weight, positions)
    return grad_u, grad_weight


IMPLEMENTATION = Implementation(forward, backward)

"""squash on backend "cuda": csrc/cuda/squash.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from caps_kernels.backends import Implementation


def forward(s: Tensor, dim: int) -> tuple[Tensor]:
    """v [...] from s [...]; lengths are taken along `dim`."""
    return (torch.ops.caps_kernels_cuda.squash_fwd(s, dim),)


def backward(grad_v: Tensor, s: Tensor, dim: int) -> tuple[Tensor]:
    """grad_s [...] from grad_v [...] and s [...]."""
    return (torch.ops.caps_kernels_cuda.squash_bwd(grad_v, s, dim),)


IMPLEMENTATION = Implementation(forward, backward)

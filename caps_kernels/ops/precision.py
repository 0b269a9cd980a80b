"""In which precision sums are taken: one rule for all ops and backends."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit inputs, else the inputs' own dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def accumulate(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which its sums are taken."""
    return tensor.to(accumulation_dtype(tensor.dtype))

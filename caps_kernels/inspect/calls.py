"""The raw calls of an op, forward and backward, for a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from caps_kernels import _autograd, backends

Results = tuple[Tensor, ...]


def arguments(op: str, sample: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """The arguments of the op's schema, tensors full of ones."""
    tensors = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in sample.shapes.items()}
    return backends._PREPARE[op](**tensors, **sample.options)


def calls(
    op: str, sample: Any, dtype: torch.dtype, device: str, backend: str
) -> tuple[Callable[[], Results], Callable[[Tensor, Results], Results]]:
    """Forward, and backward of a gradient and forward's results, on a backend."""
    args = arguments(op, sample, dtype, device)
    implementation = backends.implementation(op, backend)
    signature = _autograd.SIGNATURES[op]

    def backward(grad: Tensor, results: Results) -> Results:
        saved = results[1 : 1 + signature.saved]
        inputs, options = args[: signature.tensors], args[signature.tensors :]
        return implementation.backward(grad, *inputs, *saved, *options)

    return lambda: implementation.forward(*args), backward

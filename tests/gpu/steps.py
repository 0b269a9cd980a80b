"""A call of an op, forward and backward, as tests/gpu make it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests import cases
from tests.cases import Case

CASES = {
    "squash": cases.squash("gpu", 300, 10, 16),
    "predict_votes": cases.predict_votes("gpu", 33, 130, 10, 8, 16),
    "dynamic_routing": cases.dynamic_routing("gpu", 33, 130, 10, 16, bias=True),
    "dense_capsules": cases.dense_capsules("gpu", 33, 130, 10, 8, 16, bias=True),
}
"""One call an op: the paper's capsules, and more samples and input capsules than a block or a tile takes."""
SMALL = {
    "squash": cases.squash("small", 3, 2, 4),
    "predict_votes": cases.predict_votes("small", 2, 5, 3, 2, 4),
    "dynamic_routing": cases.dynamic_routing("small", 2, 5, 3, 4),
    "dense_capsules": cases.dense_capsules("small", 2, 5, 3, 2, 4),
}
"""One call an op of so few numbers that several threads of a program hold the same one."""


def grad_output(case: Case, inputs: Sequence[Tensor]) -> Tensor:
    """A gradient of the result to start from, on the inputs' device; it waits for that device."""
    with torch.no_grad():
        v = case.call([t.detach() for t in inputs], "reference")
    return torch.linspace(-1, 1, v.numel(), dtype=torch.float64).view(v.shape).to(v)


def step(case: Case, inputs: Sequence[Tensor], grad: Tensor, backend: str) -> tuple[Tensor, ...]:
    """The result and a gradient for each input."""
    result = case.call(inputs, backend)
    return (result.detach(), *torch.autograd.grad(result, inputs, grad))

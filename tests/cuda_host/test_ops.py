"""Every op of backend "cuda" on the host: values and gradients against float64, whatever the order of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from caps_kernels import backends
from tests.cases import Case
from tests.cuda_host import host
from tests.cuda_host.cases import HOST_CASES
from tests.test_op_contract import ROUTING_OPS, RTOL, assert_near, gradients, prepared, saved, weighted_sum

CASES = [case for case in HOST_CASES if case.op in host.ops() and (case.op, "cuda") in backends._IMPLEMENTATIONS]
ORDERS = host.orders({"order": 0}, {"order": 1}, {"order": 2, "seed": 1}, {"order": 2, "seed": 2})


def run(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Everything that forward and backward return for a gradient of v that differs from element to element."""
    implementation = backends.implementation(case.op, "cuda")
    args = prepared(case, inputs)
    results = implementation.forward(*args)
    leaf = results[0].detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(weighted_sum(leaf), leaf)
    tensors = [a for a in args if a is None or isinstance(a, Tensor)]
    options: tuple[Any, ...] = args[len(tensors) :]
    return (*results, *implementation.backward(grad.to(results[0].dtype), *tensors, *saved(case.op, results), *options))


def wanted_of(case: Case, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference's result and gradients for the very numbers of `inputs`, in float64."""
    exact = [t.double().requires_grad_() for t in inputs]
    result = case.call(exact, "reference")
    return result.detach(), gradients(result, exact)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_results_are_near_the_reference_and_the_same_in_every_order(
    case: Case, dtype: torch.dtype, permuted: bool, raw_ops: None
) -> None:
    inputs = case.inputs(dtype, permuted=permuted, requires_grad=False)
    library = host.load(case.op)
    found = []
    for order in ORDERS:
        with library.settings(**order):
            found.append(run(case, inputs))
    v, *_ = found[0]
    grads = found[0][3:] if case.op in ROUTING_OPS else found[0][1:]
    wanted, wanted_grads = wanted_of(case, inputs)
    assert_near(v, wanted, RTOL[dtype], "result")
    for name, got, want in zip(case.shapes, grads, wanted_grads, strict=False):
        assert_near(got, want, 4 * RTOL[dtype], f"gradient of {name}")
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)

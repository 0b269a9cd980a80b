"""Sizes as people use them, against the reference in float64; what stays out of memory; more than 2³¹ elements."""

from __future__ import annotations

import pytest
import torch

from tests import cases
from tests.cases import Case
from tests.gpu.steps import grad_output, step
from tests.test_op_contract import assert_near

TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
CASES = (
    cases.dense_capsules("main", 128, 1152, 10, 8, 16),
    cases.dense_capsules("59-classes", 16, 1152, 59, 8, 16, bias=True, leaky=True),
    cases.dense_capsules("convolutional", 40, 288, 32, 16, 16, positions=36),
    cases.dense_capsules("odd", 37, 211, 13, 9, 21, bias=True, iterations=4),
    cases.dense_capsules("one-sample", 1, 1152, 10, 8, 16, routing_grad="last"),
    cases.dynamic_routing("votes", 64, 1152, 10, 16, bias=True, leaky=True),
    cases.predict_votes("matrices", 64, 1152, 10, 8, 16),
    cases.squash("long", 1000, 3000),
)
SMALL = (
    cases.dense_capsules("odd", 5, 21, 3, 5, 7, bias=True, iterations=4),
    cases.dynamic_routing("votes", 3, 33, 5, 9, bias=True, leaky=True),
    cases.predict_votes("matrices", 5, 21, 3, 5, 7),
    cases.squash("long", 3, 5000),
)
"""Those that an interpreter can run, too."""


def scaled(case: Case, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Inputs whose votes are of size 1, so that couplings are neither flat nor 0 or 1."""
    inputs = case.inputs(dtype, device, requires_grad=False)
    if "weight" in case.shapes:
        inputs[1] /= case.shapes["weight"][2] ** 0.5
    return [t.requires_grad_() for t in inputs]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_at_full_size(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, backend, "cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_values_and_gradients(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    check(case, backend, device, dtype)


def check(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    """Compare with the reference in float64, on the same device."""
    inputs = scaled(case, dtype, device)
    grad = grad_output(case, inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = step(case, exact, grad.double(), "reference")
    for name, mine, theirs in zip(("result", *case.shapes), step(case, inputs, grad, backend), wanted, strict=True):
        assert_near(mine, theirs, TOLERANCE[dtype], name)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_votes_and_their_gradients_never_reach_memory(backend: str, dtype: torch.dtype) -> None:
    case = CASES[0]
    inputs = scaled(case, dtype, "cuda")
    grad = grad_output(case, inputs)
    step(case, inputs, grad, backend)  # compiles, and allocates what is kept
    votes = 128 * 1152 * 10 * 16 * 4

    def peak(backward: bool) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if backward:
            step(case, inputs, grad, backend)
        else:
            with torch.no_grad():
                case.call(inputs, backend)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(backward=False) < votes / 4
    assert peak(backward=True) < 0.4 * votes


@pytest.mark.usefixtures("cuda")
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    rows, width = 2**27 + 3, 16
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * width:
        pytest.skip("not enough GPU memory")
    s = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    s[-1] = torch.linspace(-1, 1, width)
    v = cases.squash("large", rows, width).call([s], backend)
    assert_near(v[-1], cases.squash("one", width).call([s[-1].double()], "reference"), 1e-2, "the last row")
    assert not v[:-1].any()

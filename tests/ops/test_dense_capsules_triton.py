"""dense_capsules in Triton: both sides of every size at which tiles, chunks, segments or blocks change."""

from __future__ import annotations

import pytest
import torch

from caps_kernels import backends
from tests.cases import Case, dense_capsules
from tests.test_op_contract import assert_near, device_of, gradients

LACKING = backends.lacking("dense_capsules", "triton")
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"backend triton: {LACKING}")

CASES = {
    "forward 1 x 8 samples, 2 chunks; backward 1 x 8 samples, 2 chunks": dense_capsules("2-chunks", 8, 9, 3, 5, 6),
    "forward 1 x 16 samples, 1 chunks; backward 1 x 16 samples, 1 chunks": dense_capsules(
        "9-samples", 9, 8, 10, 8, 16, bias=True, leaky=True
    ),
    "forward 2 x 64 samples, 1 chunks; backward 3 x 32 samples, 1 chunks": dense_capsules(
        "65-samples", 65, 3, 10, 8, 16, bias=True
    ),
    "forward 2 x 8 samples, 1 chunks; backward 2 x 8 samples, 1 chunks": dense_capsules(
        "8-samples-of-1024-columns", 9, 2, 33, 8, 16, leaky=True
    ),
    "forward 1 x 4 samples, 1 chunks; backward 1 x 4 samples, 1 chunks": dense_capsules(
        "without-matrix-units", 3, 2, 65, 3, 16
    ),
    "forward 3 x 64 samples, 1 chunks; backward 3 x 64 samples, 1 chunks": dense_capsules(
        "two-segments", 129, 2, 3, 17, 5, bias=True, positions=2
    ),
}
"""By what `explain` says of them in float32."""


def regime(case: Case, dtype: torch.dtype) -> str | None:
    inputs = dict(zip(case.shapes, case.inputs(dtype, device_of("triton")), strict=True))
    verdicts = {v.backend: v for v in backends.explain("dense_capsules", **inputs, **case.options)}
    return verdicts["triton"].regime


@pytest.mark.parametrize(("told", "case"), CASES.items(), ids=str)
def test_every_division(told: str, case: Case) -> None:
    assert regime(case, torch.float32) == told
    inputs = [(0.5 * t).detach().requires_grad_() for t in case.inputs(torch.float32, device_of("triton"))]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    result, wanted = case.call(inputs, "triton"), case.call(exact, "reference")
    assert_near(result, wanted, 5e-6, "v")
    for name, got, want in zip(case.shapes, gradients(result, inputs), gradients(wanted, exact), strict=True):
        assert_near(got, want, 2e-5, f"gradient of {name}")


def test_too_many_columns_are_refused_with_the_reason() -> None:
    case = dense_capsules("", 1, 1, 513, 1, 16)
    with pytest.raises(backends.BackendError, match="16,384 columns"):
        case.call(case.inputs(torch.float32, device_of("triton")), "triton")


def test_results_are_the_same_bits_every_time() -> None:
    case = dense_capsules("", 3, 40, 3, 4, 5, bias=True)
    inputs = case.inputs(torch.float32, device_of("triton"))
    runs = []
    for _ in range(2):
        v = case.call(inputs, "triton")
        runs.append([v, *gradients(v, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_forward_of_28x28_moves_an_eighth_of_what_eager_pytorch_does() -> None:
    from caps_kernels.inspect import counts
    from caps_kernels.ops.dense_capsules import triton

    sample = triton.SAMPLES[0]
    assert sample.shapes["u"] == (128, 1152, 8)
    forward, backward = counts.formulas("dense_capsules", sample, torch.float32)
    assert forward.launches == 4
    assert backward.launches <= 5
    assert 8 * forward.bytes <= 0.73e9  # README.md's count of eager PyTorch; `inspect --counts` has 0.88e9

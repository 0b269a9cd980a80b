"""How exact the C++ kernels are: the figures promised in float32, and 16-bit inputs held against eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import caps_kernels as ck
from caps_kernels import _extension, backends
from tests import cases
from tests.caches import CACHES, caches_for
from tests.cases import Case
from tests.test_op_contract import assert_near, gradients

pytestmark = pytest.mark.skipif(
    _extension.MISSING["cpp"] is not None, reason=f"no C++ library: {_extension.MISSING['cpp']}"
)


def fresh_layer(case: Case) -> list[Tensor]:
    """u, weight and bias as a layer has them when it is made."""
    _, in_capsules, in_dim = case.shapes["u"]
    _, out_capsules, _, out_dim = case.shapes["weight"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = ck.CapsuleLayer(in_capsules, in_dim, out_capsules, out_dim, positions=case.options["positions"])
        u = torch.randn(case.shapes["u"]) * in_dim**-0.25
        bias = 0.1 * torch.randn(out_capsules, out_dim)
    return [t.detach().requires_grad_() for t in (u, layer.weight, bias)]


def assert_exact(case: Case, regime: str, allowed: float, allowed_gradient: float) -> None:
    """Hold v and the gradients against float64, on every instruction set. Only the regime of quads may take quads, and
    only "spread", which are tiles, one lower capsule at a time."""
    with caches_for(regime if regime in CACHES else "tiles"):
        assert_exact_in_regime(case, "tiles" if regime == "spread" else regime, allowed, allowed_gradient)


def assert_exact_in_regime(case: Case, regime: str, allowed: float, allowed_gradient: float) -> None:
    inputs = fresh_layer(case)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = case.call(exact, "reference")
    wanted_gradients = gradients(wanted, exact)
    for isa in _extension.isa_names():
        with _extension.force_isa(isa):
            verdicts = {v.backend: v for v in backends.explain("dense_capsules", *inputs, **case.options)}
            assert str(verdicts["cpp"].regime).startswith(regime)
            v = case.call(inputs, "cpp")
            found = gradients(v, inputs)
        assert_near(v, wanted, allowed, f"v with {isa}")
        for name, got, want in zip(case.shapes, found, wanted_gradients, strict=True):
            assert_near(got, want, allowed_gradient, f"gradient of {name} with {isa}")


@pytest.mark.parametrize(
    ("case", "regime"),
    [
        (cases.dense_capsules("plain", 128, 1152, 10, 8, 16, bias=True), "tiles"),
        (cases.dense_capsules("shared", 128, 1152, 10, 8, 16, bias=True, positions=36), "tiles"),
        (cases.dense_capsules("last", 128, 1152, 10, 8, 16, bias=True, routing_grad="last", leaky=True), "tiles"),
        (cases.dense_capsules("plain", 128, 1152, 10, 8, 16, bias=True), "spread"),
        (cases.dense_capsules("plain", 128, 1152, 10, 8, 16, bias=True), "quads"),
        (cases.dense_capsules("shared", 128, 1152, 10, 8, 16, bias=True, positions=36), "quads"),
        (cases.dense_capsules("16-dimensions", 32, 288, 32, 16, 16, bias=True), "quads"),
        (cases.dense_capsules("one-sample", 1, 1152, 10, 8, 16, bias=True), "rows"),
    ],
    ids=str,
)
def test_float32_at_28x28(case: Case, regime: str) -> None:
    assert_exact(case, regime, allowed=2e-6, allowed_gradient=3e-6)


@pytest.mark.parametrize(
    ("case", "regime"),
    [
        (cases.dense_capsules("one-sample", 1, 135_168, 2, 8, 16, bias=True), "rows"),
        (cases.dense_capsules("small", 9, 135_168, 2, 4, 8, bias=True), "tiles"),
        pytest.param(
            cases.dense_capsules("20-samples", 20, 135_168, 2, 8, 16, bias=True), "tiles", marks=pytest.mark.long
        ),
        pytest.param(
            cases.dense_capsules("shared", 16, 135_168, 3, 8, 16, bias=True, positions=4224),
            "tiles",
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_float32_at_180x100(case: Case, regime: str) -> None:
    assert_exact(case, regime, allowed=1e-5, allowed_gradient=1e-5)


SIXTEEN_BIT_CASES = (
    cases.squash("rows", 50, 16),
    cases.squash("side-by-side", 20, 50, dim=0),
    cases.predict_votes("votes", 20, 30, 5, 8, 16),
    cases.dynamic_routing("routing", 6, 200, 10, 16, bias=True),
    cases.dense_capsules("rows", 2, 200, 10, 8, 16, bias=True),
    cases.dense_capsules("tiles", 40, 100, 10, 8, 16, bias=True),
    cases.dense_capsules("spread", 40, 100, 10, 8, 16, bias=True),
    cases.dense_capsules("quads", 40, 100, 10, 8, 16, bias=True),
    cases.dense_capsules("shared", 20, 100, 5, 8, 16, positions=20, bias=True, routing_grad="last"),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SIXTEEN_BIT_CASES, ids=str)
def test_16_bit_errors_are_at_most_twice_those_of_eager(case: Case, isa: str, dtype: torch.dtype) -> None:
    inputs = [(t.detach() / 4).requires_grad_() for t in case.inputs(dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found = []
    for tensors, backend in ((inputs, "cpp"), (inputs, "reference"), (exact, "reference")):
        with caches_for(case.name if case.name in CACHES else "tiles"):
            result = case.call(tensors, backend)
            found.append([result.detach(), *gradients(result, tensors)])
    for name, got, eager, want in zip(("result", *case.shapes), *found, strict=True):
        allowed = 2 * float((eager.double() - want).abs().max() / want.abs().max())
        assert allowed > 0
        assert_near(got, want, allowed, name)

"""How exact the C++ kernels are: the figures promised in float32, and 16-bit inputs held against eager PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import caps_kernels as ck
from caps_kernels import _extension, backends
from caps_kernels.functional import dense_capsules
from tests import cases
from tests.cases import Case
from tests.test_op_contract import assert_near, gradients

pytestmark = pytest.mark.skipif(
    _extension.MISSING["cpp"] is not None, reason=f"no C++ library: {_extension.MISSING['cpp']}"
)


def fresh_layer(
    batch: int, in_capsules: int, out_capsules: int, in_dim: int, out_dim: int, positions: int
) -> list[Tensor]:
    """u, weight and bias as the layer has them when it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = ck.CapsuleLayer(in_capsules, in_dim, out_capsules, out_dim, positions=positions)
        u = torch.randn(batch, in_capsules, in_dim) * in_dim**-0.25
        bias = 0.1 * torch.randn(out_capsules, out_dim)
    return [t.detach().requires_grad_() for t in (u, layer.weight, bias)]


def assert_exact(
    shape: tuple[int, ...],
    options: dict[str, Any],
    *,
    regime: str,
    allowed: float,
    allowed_gradient: float,
) -> None:
    """Hold v and the gradients against float64, on every instruction set."""
    options = {"positions": 1, **options}
    inputs = fresh_layer(*shape, options["positions"])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = dense_capsules(*exact, **options, backend="reference")
    wanted_gradients = gradients(wanted, exact)
    for isa in _extension.isa_names():
        with _extension.force_isa(isa):
            verdicts = {v.backend: v for v in backends.explain("dense_capsules", *inputs, **options)}
            assert str(verdicts["cpp"].regime).startswith(regime)
            v = dense_capsules(*inputs, **options, backend="cpp")
            found = gradients(v, inputs)
        assert_near(v, wanted, allowed, f"v with {isa}")
        for name, got, want in zip(("u", "weight", "bias"), found, wanted_gradients, strict=True):
            assert_near(got, want, allowed_gradient, f"gradient of {name} with {isa}")


@pytest.mark.parametrize("options", [{}, {"positions": 36}, {"routing_grad": "last", "leaky": True}], ids=str)
def test_float32_at_28x28(options: dict[str, Any]) -> None:
    assert_exact((128, 1152, 10, 8, 16), options, regime="tiles", allowed=2e-6, allowed_gradient=3e-6)


def test_float32_at_28x28_of_one_sample() -> None:
    assert_exact((1, 1152, 10, 8, 16), {}, regime="rows", allowed=2e-6, allowed_gradient=3e-6)


@pytest.mark.parametrize(
    ("shape", "regime"), [((1, 135_168, 2, 8, 16), "rows"), ((9, 135_168, 2, 4, 8), "tiles")], ids=str
)
def test_float32_at_180x100(shape: tuple[int, ...], regime: str) -> None:
    assert_exact(shape, {}, regime=regime, allowed=1e-5, allowed_gradient=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "options"), [((16, 135_168, 3, 8, 16), {"positions": 4224}), ((20, 135_168, 2, 8, 16), {})], ids=str
)
def test_float32_at_180x100_of_many_samples(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    assert_exact(shape, options, regime="tiles", allowed=1e-5, allowed_gradient=1e-5)


SIXTEEN_BIT_CASES = (
    cases.squash("rows", 50, 16),
    cases.squash("side-by-side", 20, 50, dim=0),
    cases.predict_votes("votes", 20, 30, 5, 8, 16),
    cases.dynamic_routing("routing", 6, 200, 10, 16, bias=True),
    cases.dense_capsules("rows", 2, 200, 10, 8, 16, bias=True),
    cases.dense_capsules("tiles", 40, 100, 10, 8, 16, bias=True),
    cases.dense_capsules("shared", 20, 100, 5, 8, 16, positions=20, bias=True, routing_grad="last"),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SIXTEEN_BIT_CASES, ids=str)
def test_16_bit_errors_are_at_most_twice_those_of_eager(case: Case, isa: str, dtype: torch.dtype) -> None:
    inputs = [(t.detach() / 4).requires_grad_() for t in case.inputs(dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found = []
    for tensors, backend in ((inputs, "cpp"), (inputs, "reference"), (exact, "reference")):
        result = case.call(tensors, backend)
        found.append([result.detach(), *gradients(result, tensors)])
    for name, got, eager, want in zip(("result", *case.shapes), *found, strict=True):
        allowed = 2 * float((eager.double() - want).abs().max() / want.abs().max())
        assert allowed > 0
        assert_near(got, want, allowed, name)

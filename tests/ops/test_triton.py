"""squash, predict_votes and dynamic_routing in Triton: sizes at which a kernel takes another path, limits of tiles,
dtypes, accuracy, determinism. dense_capsules has a file of its own.
"""

from __future__ import annotations

import pytest
import torch

from caps_kernels import backends
from tests import cases
from tests.cases import Case
from tests.test_op_contract import RTOL, assert_near, device_of, gradients

LACKING = backends.lacking("squash", "triton")
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"backend triton: {LACKING}")

CASES = (
    cases.squash("triton-several-programs", 700, 8),
    cases.squash("triton-side-by-side", 3, 20, 37, dim=1),
    cases.squash("triton-one-a-program", 3, 2500),
    cases.squash("triton-in-parts", 2, 9001),
    cases.squash("triton-in-parts-side-by-side", 5000, 2, dim=0),
    cases.predict_votes("triton-tiles-and-a-part", 70, 3, 3, 8, 24),
    cases.predict_votes("triton-several-parts", 3, 260, 2, 3, 5, positions=130),
    cases.predict_votes("triton-deep", 5, 2, 2, 67, 3),
    cases.predict_votes("triton-one-sample", 1, 5, 10, 8, 16),
    cases.dynamic_routing("triton-tiles-and-a-part", 2, 37, 10, 16),
    cases.dynamic_routing("triton-chunks", 2, 150, 3, 4, bias=True, leaky=True),
    cases.dynamic_routing("triton-five-iterations", 2, 26, 7, 11, bias=True, iterations=5),
    cases.dynamic_routing("triton-last", 2, 37, 10, 16, bias=True, routing_grad="last"),
    cases.dynamic_routing("triton-one-row", 1, 5, 40, 50),
    cases.dynamic_routing("triton-many-parents", 1, 1, 530, 16, bias=True, leaky=True, iterations=2),
    cases.dynamic_routing("triton-long-votes", 1, 3, 5, 2100, bias=True),
    cases.dynamic_routing("triton-long-votes-last", 1, 3, 5, 2100, bias=True, routing_grad="last"),
)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_and_dtype(case: Case, dtype: torch.dtype, permuted: bool) -> None:
    device = device_of("triton")
    inputs = case.inputs(dtype, device, permuted=permuted)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    wanted = case.call(exact, "reference")
    result = case.call(inputs, "triton")
    assert_near(result, wanted, 2 * RTOL[dtype], "result")
    for name, got, want in zip(case.shapes, gradients(result, inputs), gradients(wanted, exact), strict=True):
        assert got.is_contiguous()
        assert_near(got, want, 20 * RTOL[dtype], f"gradient of {name}")


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.op == "dynamic_routing"], ids=str)
def test_wide_routing_computes_what_tiles_do(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from caps_kernels.ops.dynamic_routing import triton as routing

    inputs = case.inputs(torch.float64, device_of("triton"))
    v, coupling = case.call(inputs, "triton", return_coupling=True)
    monkeypatch.setattr(routing, "LARGEST_TILE", 0)
    wide_v, wide_coupling = case.call(inputs, "triton", return_coupling=True)
    assert_near(wide_v, v, 1e-13, "v")
    assert_near(wide_coupling, coupling, 1e-13, "coupling")
    for name, got, want in zip(case.shapes, gradients(wide_v, inputs), gradients(v, inputs), strict=True):
        assert_near(got, want, 1e-12, f"gradient of {name}")


@pytest.mark.parametrize("case", [cases.dynamic_routing("", 2, 150, 3, 4, bias=True)], ids=str)
def test_results_are_the_same_bits_every_time(case: Case) -> None:
    inputs = case.inputs(torch.float32, device_of("triton"))
    found = []
    for _ in range(2):
        result = case.call(inputs, "triton")
        found.append([result, *gradients(result, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="counted in Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["squash", "predict_votes", "dynamic_routing"])
def test_launches_and_bytes_are_those_of_the_formula(op: str, dtype: torch.dtype) -> None:
    from caps_kernels.inspect import counts_table

    for sample in counts_table.small_samples(op):
        assert counts_table.differences(op, sample, dtype) == [], sample.name


@pytest.mark.parametrize(
    ("op", "shapes", "regime"),
    [
        ("squash", ((2, 4096),), "whole vectors in tiles"),
        ("squash", ((2, 4097),), "vectors read in parts, twice"),
        ("predict_votes", ((1, 9, 8), (9, 10, 8, 16)), "tiles of 16 lower capsules by 128 elements of their votes"),
        ("dynamic_routing", ((2, 1152, 10, 16),), "29 chunks a sample, tiles of 8 lower capsules"),
        (
            "dynamic_routing",
            ((2, 5, 1000, 16),),
            "wide: coefficients written, the votes read several times an iteration",
        ),
    ],
)
def test_the_regime_is_told(op: str, shapes: tuple[tuple[int, ...], ...], regime: str) -> None:
    inputs = [torch.ones(shape, device=device_of("triton")) for shape in shapes]
    verdicts = {v.backend: v for v in backends.explain(op, *inputs)}
    assert verdicts["triton"].regime == regime

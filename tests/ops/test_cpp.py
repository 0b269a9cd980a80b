"""squash, predict_votes and dynamic_routing in C++: every instruction set, any number of threads, sizes at which the
kernels take another path, conversions of 16-bit numbers, accuracy. dense_capsules has a file of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from caps_kernels import _extension, backends
from caps_kernels.functional import dynamic_routing, predict_votes, squash
from caps_kernels.ops.dynamic_routing import cpp as routing
from tests import cases
from tests.cases import Case
from tests.test_op_contract import RTOL, assert_near, gradients

pytestmark = pytest.mark.skipif(
    _extension.MISSING["cpp"] is not None, reason=f"no C++ library: {_extension.MISSING['cpp']}"
)

CASES = (
    cases.squash("two-vectors-and-a-part", 5, 35),
    cases.squash("half-a-vector", 70, 8),
    cases.squash("part-of-half-a-vector", 70, 3),
    cases.squash("many-chunks", 3, 300, 16),
    cases.squash("single-numbers", 700, 1),
    cases.squash("side-by-side", 3, 20, 37, dim=1),
    cases.squash("side-by-side-outermost", 21, 300, dim=0),
    cases.predict_votes("whole-vectors", 17, 9, 3, 8, 16),
    cases.predict_votes("odd", 13, 6, 3, 9, 21),
    cases.predict_votes("few-types", 40, 30, 2, 5, 7, positions=10),
    cases.predict_votes("one-type", 3, 150, 3, 8, 16, positions=150),
    cases.predict_votes("one-sample", 1, 70, 3, 8, 16),
    cases.predict_votes("many-blocks-of-rows", 130, 5, 2, 17, 4),
    cases.dynamic_routing("a-block", 2, 16, 10, 16),
    cases.dynamic_routing("blocks-and-a-part", 2, 75, 3, 8, bias=True, leaky=True),
    cases.dynamic_routing("two-vectors", 2, 40, 5, 32, iterations=4),
    cases.dynamic_routing("three-vectors-and-a-part", 1, 33, 3, 53, bias=True),
    cases.dynamic_routing("odd-last", 3, 21, 7, 21, bias=True, routing_grad="last"),
    cases.dynamic_routing("some-chunks", 2, 700, 60, 5, bias=True, iterations=2),
    cases.dynamic_routing("split", 3, 700, 11, 16, bias=True),
    cases.dynamic_routing("split-odd-last", 3, 1500, 11, 7, bias=True, routing_grad="last", leaky=True),
)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_dtype_and_number_of_threads(case: Case, isa: str, permuted: bool, threads: None) -> None:
    for dtype, rtol in RTOL.items():
        inputs = case.inputs(dtype, permuted=permuted)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        wanted = case.call(exact, "reference")
        wanted_gradients = gradients(wanted, exact)
        found = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            result = case.call(inputs, "cpp")
            found.append([result.detach(), *gradients(result, inputs)])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        assert all(t.is_contiguous() for t in found[0])
        assert_near(found[0][0], wanted, 2 * rtol, f"result in {dtype}")
        for name, got, want in zip(case.shapes, found[0][1:], wanted_gradients, strict=True):
            assert_near(got, want, 20 * rtol, f"gradient of {name} in {dtype}")


def test_an_instruction_set_that_is_not_there_is_refused_and_the_one_before_comes_back() -> None:
    before = library_isa()
    with _extension.force_isa(_extension.isa_names()[0]):
        with (
            pytest.raises(ValueError, match="this processor cannot run instruction set 'v9'"),
            _extension.force_isa("v9"),
        ):
            pass
        assert library_isa() == _extension.isa_names()[0]
    assert library_isa() == before


def library_isa() -> Any:
    from caps_kernels import _cpp  # type: ignore[attr-defined]

    return _cpp.get_isa()


def routing_results(votes: Tensor, bias: Tensor, **options: Any) -> list[Tensor]:
    v, coupling = dynamic_routing(votes, bias, return_coupling=True, backend="cpp", **options)
    return [v, coupling, *gradients(v, [votes, bias])]


@pytest.mark.parametrize("options", [{}, {"iterations": 4, "leaky": True}, {"routing_grad": "last"}], ids=str)
def test_regimes_of_routing_give_the_same_bits(
    isa: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    votes, bias = cases.dynamic_routing("", 3, 201, 40, 9, bias=True).inputs(torch.float32)
    assert routing.regime(votes) == "samples"
    wanted = routing_results(votes, bias, **options)
    monkeypatch.setattr(routing, "REMEMBERED", -1)
    computed_again = routing_results(votes, bias, **options)
    monkeypatch.setattr(routing, "SMALL", 0)
    assert routing.regime(votes) == "split"
    split_computed_again = routing_results(votes, bias, **options)
    monkeypatch.undo()
    monkeypatch.setattr(routing, "SMALL", 0)
    split = routing_results(votes, bias, **options)
    for other in (computed_again, split_computed_again, split):
        assert all(torch.equal(a, b) for a, b in zip(wanted, other, strict=True))


@pytest.mark.parametrize(
    ("batch", "in_capsules", "regime"),
    # With J·E = 1024 float32: up to 1 MiB in all, then by the number of samples, which is another beyond 4 MiB each.
    [
        *((1, 256, "samples"), (1, 257, "split"), (15, 1024, "split"), (16, 1024, "samples")),
        *((16, 1025, "split"), (255, 1025, "split"), (256, 1025, "samples")),
    ],
)
def test_the_regime_of_routing_is_told(batch: int, in_capsules: int, regime: str) -> None:
    votes = torch.empty(1).expand(batch, in_capsules, 64, 16)
    verdicts = {v.backend: v for v in backends.explain("dynamic_routing", votes)}
    assert verdicts["cpp"].chosen
    assert verdicts["cpp"].regime == regime
    assert routing.regime(votes.bfloat16()) == regime


def test_large_results_equal_those_of_one_sample(isa: str) -> None:
    # 34 MB of votes, which are written past the cache.
    u, weight = cases.predict_votes("", 65, 128, 64, 3, 16).inputs(torch.float32, requires_grad=False)
    votes = predict_votes(u, weight, backend="cpp")
    assert torch.equal(votes[-1:], predict_votes(u[-1:], weight, backend="cpp"))
    last = votes[-1:].clone().requires_grad_()
    votes.requires_grad_()
    v, v_last = dynamic_routing(votes, backend="cpp"), dynamic_routing(last, backend="cpp")
    assert torch.equal(v[-1:], v_last)
    (grad,) = torch.autograd.grad(v[-1].square().sum(), votes)
    (grad_last,) = torch.autograd.grad(v_last.square().sum(), last)
    assert torch.equal(grad[-1:], grad_last)
    assert not grad[:-1].any()
    squashed, squashed_last = squash(votes, backend="cpp"), squash(last, backend="cpp")
    assert torch.equal(squashed[-1:], squashed_last)
    (grad,) = torch.autograd.grad(squashed.sum(), votes)
    (grad_last,) = torch.autograd.grad(squashed_last.sum(), last)
    assert torch.equal(grad[-1:], grad_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dim", [1, 16, 21])
def test_every_16_bit_number_is_read_and_written_exactly(isa: str, dtype: torch.dtype, out_dim: int) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.ones(1, 1, 1, out_dim, dtype=dtype)
    votes = predict_votes(numbers.view(-1, 1, 1), one, backend="cpp").flatten(1)
    assert torch.equal(votes.isnan(), numbers.isnan()[:, None].expand_as(votes))
    wanted = numbers.nan_to_num(0.0, float("inf"), -float("inf"))[:, None].expand_as(votes)
    assert torch.equal(votes.nan_to_num(0.0, float("inf"), -float("inf")), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dim", [1, 16, 21])
def test_results_are_rounded_to_16_bits_as_pytorch_does(isa: str, dtype: torch.dtype, out_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Products of two such numbers are exact in float32, and reach from below the smallest subnormal number to overflow.
    size = 2.0 ** torch.randint(-14, 15, (5000,), generator=generator)
    u = (torch.randn(5000, generator=generator) * size).to(dtype)
    weight = (torch.randn(out_dim, generator=generator) * 2.0 ** torch.randint(-10, 5, (out_dim,))).to(dtype)
    votes = predict_votes(u.view(-1, 1, 1), weight.view(1, 1, 1, -1), backend="cpp").flatten(1)
    assert torch.equal(votes, (u.float()[:, None] * weight.float()).to(dtype))


def test_squash_of_mixed_scales(isa: str) -> None:
    # Vectors that can be squared and those that cannot stand side by side, along either dimension.
    s = torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s *= 10.0 ** torch.linspace(-30, 30, 60)[:, None]
    s[7] = 0
    for dtype in (torch.float32, torch.bfloat16):
        for dim, values in ((1, s), (0, s.T)):
            values = values.to(dtype).requires_grad_()
            exact = values.detach().double().requires_grad_()
            v, wanted = squash(values, dim, backend="cpp"), squash(exact, dim, backend="reference")
            rtol = 5e-6 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(v.double(), wanted, rtol=rtol, atol=1e-37)
            grad = torch.ones_like(v)
            (got,) = torch.autograd.grad(v, values, grad)
            (want,) = torch.autograd.grad(wanted, exact, grad.double())
            scale = want.abs().amax(dim, keepdim=True)
            assert ((got - want).abs() <= rtol * scale + 1e-37).all()


def test_couplings_are_right_down_to_the_smallest(isa: str) -> None:
    # Logits are products of a vote with a vector almost as long as 1: from 0 to 740 and back, beyond exp's range.
    votes = torch.zeros(1, 50, 2, 1, dtype=torch.float64)
    votes[0, :, 0, 0] = torch.linspace(-740, 745, 50)
    _, coupling = dynamic_routing(votes, iterations=2, return_coupling=True, backend="cpp")
    _, wanted = dynamic_routing(votes, iterations=2, return_coupling=True, backend="reference")
    assert wanted.min() < 1e-300
    torch.testing.assert_close(coupling, wanted, rtol=1e-12, atol=1e-320)


@pytest.mark.parametrize(
    ("shape", "allowed", "allowed_gradient"),
    [((4, 1152, 10, 16), 2e-6, 3e-6), ((1, 135_168, 3, 8), 1e-5, 1e-5)],
    ids=["28x28", "180x100"],
)
def test_float32_accuracy_of_routing(isa: str, shape: tuple[int, ...], allowed: float, allowed_gradient: float) -> None:
    generator = torch.Generator().manual_seed(0)
    votes = (torch.randn(shape, generator=generator) + 0.05).requires_grad_()
    exact = votes.detach().double().requires_grad_()
    v, wanted = dynamic_routing(votes, backend="cpp"), dynamic_routing(exact, backend="reference")
    assert_near(v, wanted, allowed, "v")
    (got,), (want,) = gradients(v, [votes]), gradients(wanted, [exact])
    assert_near(got, want, allowed_gradient, "gradient of votes")

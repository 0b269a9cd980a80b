"""dense_capsules: equal to its two parts, memory layouts, accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from caps_kernels.functional import dense_capsules, dynamic_routing, predict_votes
from tests import oracle
from tests.test_op_contract import INTERPRETED


def inputs(b: int, i: int, j: int, d: int, e: int, positions: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, i, d), (i // positions, j, d, e), (j, e))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": 4}, {"leaky": True}, {"iterations": 1}, {"routing_grad": "last", "positions": 2}],
    ids=str,
)
def test_equals_votes_then_routing(backend: str, options: dict[str, Any]) -> None:
    positions = options.get("positions", 1)
    u, weight, bias = (t.requires_grad_() for t in inputs(3, 8, 5, 4, 6, positions))
    whole = dense_capsules(u, weight, bias, backend=backend, **options)
    routing = {name: value for name, value in options.items() if name != "positions"}
    votes = predict_votes(u, weight, positions=positions, backend=backend)
    parts = dynamic_routing(votes, bias, backend=backend, **routing)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)
    for got, want in zip(
        torch.autograd.grad(whole.sin().sum(), (u, weight, bias)),
        torch.autograd.grad(parts.sin().sum(), (u, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_bad_samples_spoil_only_their_own_output_and_gradient(backend: str) -> None:
    u, weight, bias = (t.float() for t in inputs(4, 6, 3, 2, 5))
    clean_u = u.clone().requires_grad_()
    clean = dense_capsules(clean_u, weight, bias, backend=backend)
    (clean_grad,) = torch.autograd.grad(clean.sum(), clean_u)
    for bad in (float("nan"), float("inf"), 1e30):
        poisoned = u.clone()
        poisoned[2, 3] = bad
        poisoned.requires_grad_()
        v = dense_capsules(poisoned, weight, bias, backend=backend)
        (grad,) = torch.autograd.grad(v.sum(), poisoned)
        others = [0, 1, 3]
        assert torch.equal(v[others], clean[others])
        assert torch.equal(grad[others], clean_grad[others])


def test_gradients_only_where_they_are_wanted(backend: str) -> None:
    u, weight, bias = inputs(2, 4, 3, 2, 3)
    for wanted in range(3):
        tensors = [t.clone().requires_grad_(n == wanted) for n, t in enumerate((u, weight, bias))]
        v: Tensor = dense_capsules(*tensors, backend=backend)  # type: ignore[call-overload]
        v.sum().backward()
        assert [t.grad is not None for t in tensors] == [n == wanted for n in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_error_is_at_most_twice_that_of_eager_pytorch(backend: str, dtype: torch.dtype) -> None:
    exact = inputs(4, 40, 5, 8, 16)
    u, weight, bias = (t.to(dtype) for t in exact)
    weight = weight / 8
    rounded = [t.double() for t in (u, weight, bias)]
    wanted = oracle.dense_capsules(rounded[0], rounded[1], rounded[2])
    with torch.no_grad():
        votes = torch.einsum("bid,ijde->bije", u, weight)
        eager = dynamic_routing_in_dtype(votes, bias)
    error = (dense_capsules(u, weight, bias, backend=backend).double() - wanted).abs().max()
    assert error <= 2 * (eager.double() - wanted).abs().max()


def dynamic_routing_in_dtype(votes: Tensor, bias: Tensor, iterations: int = 3) -> Tensor:
    """Routing as eager PyTorch does it in 16 bits throughout."""
    logits = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations):
        s = (logits.softmax(2)[..., None] * votes).sum(1) + bias
        square = s.square().sum(2, keepdim=True)
        v = square / (1 + square) * s / square.sqrt()
        logits = logits + (votes * v[:, None]).sum(3)
    return v


def test_float32_accuracy_at_the_layer_of_the_paper(backend: str) -> None:
    u, weight, _ = inputs(8, 72 if backend == INTERPRETED else 1152, 10, 8, 16)
    weight = weight * 0.05
    exact = (u.clone().requires_grad_(), weight.clone().requires_grad_())
    single = (u.float().requires_grad_(), weight.float().requires_grad_())
    wanted, got = dense_capsules(*exact, backend="reference"), dense_capsules(*single, backend=backend)
    pairs = [(got, wanted, 2e-6)]
    for g, w in zip(
        torch.autograd.grad(got.square().sum(), single), torch.autograd.grad(wanted.square().sum(), exact), strict=True
    ):
        pairs.append((g, w, 5e-6))
    for g, w, allowed in pairs:
        assert float((g.detach().double() - w.detach()).abs().max() / w.detach().abs().max()) <= allowed

"""dynamic_routing: examples by hand and what must hold for any votes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from caps_kernels.functional import dynamic_routing


def squashed(x: float) -> float:
    return x * abs(x) / (1 + x * x)


def random_votes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_iteration_by_hand(backend: str) -> None:
    # Couplings are 1/2, so s = ((2 + 4) / 2, (1 - 1) / 2) = (3, 0).
    votes = torch.tensor([[[[2.0], [1.0]], [[4.0], [-1.0]]]], dtype=torch.float64)
    v, coupling = dynamic_routing(votes, iterations=1, return_coupling=True, backend=backend)
    assert coupling.tolist() == [[[0.5, 0.5], [0.5, 0.5]]]
    assert v.flatten().tolist() == pytest.approx([0.9, 0.0], rel=1e-15)


def test_two_iterations_by_hand(backend: str) -> None:
    # One child that votes 1 for the first parent and 3 for the second: s = (0.5, 1.5), v = (0.2, 9/13), logits
    # (0.2, 27/13), and the second softmax weighs the votes again.
    votes = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64)
    first, second = math.exp(0.2), math.exp(27 / 13)
    share = first / (first + second)
    v, coupling = dynamic_routing(votes, iterations=2, return_coupling=True, backend=backend)
    assert coupling.flatten().tolist() == pytest.approx([share, 1 - share], rel=1e-15)
    assert v.flatten().tolist() == pytest.approx([squashed(share), squashed(3 * (1 - share))], rel=1e-14)


def test_leaky_by_hand(backend: str) -> None:
    # With the dropped parent there are three shares of 1/3.
    votes = torch.tensor([[[[3.0], [6.0]]]], dtype=torch.float64)
    v, coupling = dynamic_routing(votes, iterations=1, leaky=True, return_coupling=True, backend=backend)
    assert coupling.flatten().tolist() == pytest.approx([1 / 3, 1 / 3], rel=1e-15)
    assert v.flatten().tolist() == pytest.approx([0.5, 0.8], rel=1e-15)


def test_bias_is_added_to_the_total_input(backend: str) -> None:
    votes = torch.zeros(2, 3, 2, 1, dtype=torch.float64)
    bias = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    v = dynamic_routing(votes, bias, backend=backend)
    assert v[1].flatten().tolist() == pytest.approx([0.5, -0.9], rel=1e-15)


def test_routing_sends_children_to_the_parent_they_agree_on(backend: str) -> None:
    # All children vote alike for parent 0 and at random for parent 1.
    votes = random_votes(1, 50, 2, 8)
    votes[:, :, 0] = torch.tensor([1.0] + 7 * [0.0], dtype=torch.float64)
    shares = [
        dynamic_routing(votes, iterations=r, return_coupling=True, backend=backend)[1][..., 0].mean() for r in (1, 3, 5)
    ]
    assert shares[0] == 0.5
    assert shares[0] < shares[1] < shares[2]
    assert shares[1] > 0.6


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_couplings_sum_to_one_over_the_parents_unless_leaky(backend: str, iterations: int) -> None:
    votes = random_votes(3, 7, 5, 4)
    options = {"iterations": iterations, "return_coupling": True, "backend": backend}
    _, coupling = dynamic_routing(votes, **options)  # type: ignore[call-overload]
    torch.testing.assert_close(coupling.sum(2), torch.ones(3, 7, dtype=torch.float64), rtol=1e-14, atol=0)
    assert (coupling > 0).all()
    _, leaky = dynamic_routing(votes, leaky=True, **options)  # type: ignore[call-overload]
    assert (leaky.sum(2) < 1).all()
    assert (leaky > 0).all()


def test_order_of_children_and_parents_does_not_matter(backend: str) -> None:
    votes, bias = random_votes(2, 6, 4, 3), random_votes(4, 3, seed=1)
    children, parents = torch.randperm(6), torch.randperm(4)
    v = dynamic_routing(votes, bias, backend=backend)
    shuffled = dynamic_routing(votes[:, children][:, :, parents], bias[parents], backend=backend)
    torch.testing.assert_close(shuffled, v[:, parents], rtol=1e-12, atol=1e-14)


def test_rotating_all_votes_rotates_the_output(backend: str) -> None:
    votes = random_votes(2, 6, 4, 5)
    rotation, _ = torch.linalg.qr(random_votes(5, 5, seed=2))
    v = dynamic_routing(votes, backend=backend)
    torch.testing.assert_close(dynamic_routing(votes @ rotation, backend=backend), v @ rotation)


def test_lengths_are_below_one(backend: str) -> None:
    lengths = dynamic_routing(100 * random_votes(4, 20, 6, 8), backend=backend).norm(dim=2)
    assert (lengths < 1).all()
    assert (lengths > 0.5).any()


def test_large_logits_do_not_overflow(backend: str) -> None:
    # A parent's logits reach 1e5 · 1: exp of them is inf, the softmax must not be.
    votes = (1e5 * random_votes(1, 4, 3, 2)).float().requires_grad_()
    v = dynamic_routing(votes, backend=backend)
    (grad,) = torch.autograd.grad(v.sum(), votes)
    assert v.isfinite().all()
    assert grad.isfinite().all()


def test_last_treats_the_last_couplings_as_constants(backend: str) -> None:
    votes, bias = random_votes(2, 5, 3, 4).requires_grad_(), random_votes(3, 4, seed=1).requires_grad_()
    v, coupling = dynamic_routing(votes, bias, routing_grad="last", return_coupling=True, backend=backend)
    s = (coupling[..., None] * votes).sum(1) + bias
    norm = s.norm(dim=2, keepdim=True)
    plain = norm / (1 + norm**2) * s
    torch.testing.assert_close(v, plain)
    for got, want in zip(
        torch.autograd.grad(v.square().sum(), (votes, bias)),
        torch.autograd.grad(plain.square().sum(), (votes, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_one_sample_of_nan_reaches_no_other(backend: str) -> None:
    votes = random_votes(3, 5, 4, 3).float()
    clean = dynamic_routing(votes, backend=backend)
    for bad in (float("nan"), float("inf"), 3e38):
        poisoned = votes.clone()
        poisoned[1, 2] = bad
        poisoned.requires_grad_()
        v = dynamic_routing(poisoned, backend=backend)
        (grad,) = torch.autograd.grad(v.sum(), poisoned)
        assert torch.equal(v[[0, 2]], clean[[0, 2]])
        assert grad[[0, 2]].isfinite().all()

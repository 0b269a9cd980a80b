"""squash: examples by hand, limits, extremes."""

from __future__ import annotations

import pytest
import torch

from caps_kernels.functional import squash

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def test_by_hand(backend: str) -> None:
    # |(3, 4)| = 5: length 25/26 along (0.6, 0.8).  |(0, 0.5)| = 0.5: length 0.25/1.25.
    s = torch.tensor([[3.0, 4.0], [0.0, 0.5]], dtype=torch.float64)
    wanted = torch.tensor([[0.6 * 25 / 26, 0.8 * 25 / 26], [0.0, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(squash(s, backend=backend), wanted, rtol=1e-15, atol=0)


def test_gradient_by_hand(backend: str) -> None:
    # In one dimension squash(x) = x|x| / (1 + x²), whose derivative is 2|x| / (1 + x²)².
    x = torch.tensor([[-2.0], [-0.5], [0.25], [3.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(squash(x, backend=backend).sum(), x)
    torch.testing.assert_close(grad, (2 * x.abs() / (1 + x * x) ** 2).detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_and_gradient_vanish_at_zero(backend: str, dtype: torch.dtype) -> None:
    s = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    v = squash(s, backend=backend)
    (grad,) = torch.autograd.grad(v, s, torch.ones_like(v))
    assert torch.equal(v, torch.zeros_like(v))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_finite_vector_has_length_one_and_gradient_zero(backend: str, dtype: torch.dtype) -> None:
    s = torch.full((2, 9), torch.finfo(dtype).max, dtype=dtype)
    s[1] *= torch.linspace(-1, 1, 9, dtype=dtype)
    s.requires_grad_()
    v = squash(s, backend=backend)
    (grad,) = torch.autograd.grad(v, s, torch.ones_like(v))
    torch.testing.assert_close(v.double().norm(dim=-1), torch.ones(2, dtype=torch.float64), rtol=1e-2, atol=0)
    torch.testing.assert_close(v[0].double(), torch.full((9,), 1 / 3, dtype=torch.float64), rtol=1e-2, atol=0)
    assert grad.abs().max() <= 2 / torch.finfo(dtype).max ** 0.5


@pytest.mark.parametrize("exponent", range(-150, 301, 25))
def test_no_digit_is_lost_at_any_scale(backend: str, exponent: int) -> None:
    direction = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64) / 7
    r = 10.0**exponent
    s = (direction * r).requires_grad_()
    v = squash(s, backend=backend)
    length = r * r / (1 + r * r) if r < 1 else 1 / (1 + r**-2)
    torch.testing.assert_close(v.detach(), direction * length, rtol=1e-14, atol=0)
    # Along the radius the derivative is 2r / (1 + r²)², across it |v| / r, the larger of the two up to a factor of 2.
    across = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)
    (along_grad,) = torch.autograd.grad(v, s, direction, retain_graph=True)
    (across_grad,) = torch.autograd.grad(v, s, across)
    slope = 2 * r / (1 + r * r) ** 2 if r < 1 else 2 / r / (1 + r**-2) / (r + 1 / r) / r
    allowed = 1e-14 * length / r
    assert float(along_grad @ direction) == pytest.approx(slope, rel=0, abs=allowed)
    torch.testing.assert_close(across_grad, across * (length / r), rtol=0, atol=4 * allowed)


def test_second_derivatives_are_finite_at_zero(backend: str) -> None:
    s = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(squash(s, backend=backend).sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum() + grad.sum(), s)
    assert second.isfinite().all()


def test_nan_and_inf_stay_in_their_vector(backend: str) -> None:
    s = torch.ones(4, 3)
    s[1, 0], s[2, 2] = float("nan"), float("inf")
    s.requires_grad_()
    v = squash(s, backend=backend)
    (grad,) = torch.autograd.grad(v, s, torch.ones_like(v))
    clean = squash(torch.ones(3), backend=backend)
    assert torch.equal(v[0], clean)
    assert torch.equal(v[3], clean)
    assert not v[1:3].isfinite().all(1).any()
    assert grad[[0, 3]].isfinite().all()

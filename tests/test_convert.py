"""`convert_weight` against the layers whose weights it takes, each written out as it is usually written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import caps_kernels as ck

pytestmark = pytest.mark.filterwarnings("ignore::caps_kernels.backends.FallbackWarning")

I, J, D, E = 6, 3, 4, 5  # noqa: E741


def squash(s: Tensor) -> Tensor:
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) * s / square.sqrt()


def route_weights(x: Tensor, weight: Tensor, iterations: int, detach: bool) -> Tensor:
    """Row vector times matrix, classes in front; as in 2017, but the softmax is over the classes."""
    priors = x[None, :, :, None, :] @ weight[:, None]  # [J, B, I, 1, E]
    logits = torch.zeros_like(priors)
    for iteration in range(iterations):
        votes = priors.detach() if detach and iteration < iterations - 1 else priors
        outputs = squash((logits.softmax(0) * votes).sum(2, keepdim=True))  # [J, B, 1, 1, E]
        logits = logits + (votes * outputs).sum(-1, keepdim=True)
    return outputs.flatten(2).transpose(0, 1)


def dense_capsule(x: Tensor, weight: Tensor, iterations: int, detach: bool) -> Tensor:
    """Matrix times column vector, classes before the lower capsules."""
    votes = (weight @ x[:, None, :, :, None]).squeeze(-1)  # [B, J, I, E]
    frozen = votes.detach() if detach else votes
    logits = torch.zeros_like(votes[..., 0])
    for _ in range(iterations - 1):
        outputs = squash((logits.softmax(1)[..., None] * frozen).sum(2, keepdim=True))  # [B, J, 1, E]
        logits = logits + (outputs * frozen).sum(-1)
    return squash((logits.softmax(1)[..., None] * votes).sum(2))


def einsum(x: Tensor, weight: Tensor, iterations: int, detach: bool) -> Tensor:
    """Matrix times column vector, lower capsules in front."""
    votes = torch.einsum("ijed,bid->bije", weight, x)
    frozen = votes.detach() if detach else votes
    logits = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations - 1):
        v = squash(torch.einsum("bij,bije->bje", logits.softmax(2), frozen))
        logits = logits + torch.einsum("bije,bje->bij", frozen, v)
    return squash(torch.einsum("bij,bije->bje", logits.softmax(2), votes))


Layer = Callable[[Tensor, Tensor, int, bool], Tensor]
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "route_weights": (route_weights, (J, I, D, E)),
    "dense_capsule": (dense_capsule, (J, I, E, D)),
    "einsum": (einsum, (I, J, E, D)),
}


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("routing_grad", ["full", "last"])
def test_a_converted_weight_gives_the_same_outputs_and_gradients(
    layout: str, iterations: int, routing_grad: str
) -> None:
    torch.manual_seed(0)
    forward, shape = LAYERS[layout]
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    u = torch.randn(2, I, D, dtype=torch.float64, requires_grad=True)
    layer = ck.CapsuleLayer(I, D, J, E, iterations, routing_grad=routing_grad, dtype=torch.float64)
    layer.load_state_dict({"weight": ck.convert_weight(weight, layout)})
    wanted, got = forward(u, weight, iterations, routing_grad == "last"), layer(u)
    torch.testing.assert_close(got, wanted)
    ramp = torch.linspace(-1, 2, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    want_u, want_weight = torch.autograd.grad((wanted * ramp).sum(), [u, weight])
    got_u, got_weight = torch.autograd.grad((got * ramp).sum(), [u, layer.weight])
    torch.testing.assert_close(got_u, want_u)
    torch.testing.assert_close(got_weight, ck.convert_weight(want_weight, layout))


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("routing_grad", ["full", "last"])
def test_second_derivatives_are_the_same_too(layout: str, routing_grad: str) -> None:
    torch.manual_seed(0)
    forward, shape = LAYERS[layout]
    weight = torch.randn(shape, dtype=torch.float64)
    u = torch.randn(2, I, D, dtype=torch.float64, requires_grad=True)
    converted = ck.convert_weight(weight, layout)

    def penalty_gradient(v: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(v.square().sum(), u, create_graph=True)
        return torch.autograd.grad(first.square().sum(), u)[0]

    wanted = penalty_gradient(forward(u, weight, 3, routing_grad == "last"))
    got = penalty_gradient(ck.functional.dense_capsules(u, converted, routing_grad=routing_grad))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_is_a_contiguous_copy_without_a_history(layout: str, dtype: torch.dtype) -> None:
    source = nn.Parameter(torch.randn(LAYERS[layout][1]).to(dtype))
    weight = ck.convert_weight(source, layout)
    assert weight.shape == (I, J, D, E)
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    assert not weight.requires_grad
    before = source.detach().clone()
    weight.zero_()
    assert torch.equal(source, before)


def test_sizes_that_are_all_equal_are_told_apart_by_the_layout() -> None:
    tensor = torch.arange(81.0).view(3, 3, 3, 3)
    results = [ck.convert_weight(tensor, layout) for layout in LAYERS]
    assert not any(torch.equal(a, b) for n, a in enumerate(results) for b in results[:n])


@pytest.mark.parametrize("layout", ["", "ours", "Einsum", None])
def test_unknown_layouts_are_refused(layout: str) -> None:
    with pytest.raises(ValueError, match="layout must be one of 'route_weights', 'dense_capsule', 'einsum', got"):
        ck.convert_weight(torch.zeros(I, J, E, D), layout)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("rank", [3, 5])
def test_tensors_of_another_rank_are_refused(layout: str, rank: int) -> None:
    dims = {"route_weights": "J, I, D, E", "dense_capsule": "J, I, E, D", "einsum": "I, J, E, D"}[layout]
    with pytest.raises(ValueError, match=rf"tensor must have shape \[{dims}\], got \[{', '.join('2' * rank)}\]"):
        ck.convert_weight(torch.zeros((2,) * rank), layout)

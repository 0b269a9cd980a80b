"""The baselines compute what the ops compute, in every layout of W."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from bench.cases import Case
from tests import oracle

PAIRS = [(peer, layout) for peer in peers.PEERS for layout in peer.layouts]


@pytest.mark.parametrize(("peer", "layout"), PAIRS, ids=[f"{peer.name}-{layout}" for peer, layout in PAIRS])
@pytest.mark.parametrize("iterations", [1, 3])
def test_layer_and_its_gradients(peer: peers.Peer, layout: str, iterations: int) -> None:
    case = Case("x", batch=2, in_capsules=4, out_capsules=3, in_dim=2, out_dim=5, dtype="float64")
    (u, weight), grad = case.inputs(), case.grad_output()
    right = oracle.dense_capsules(u, weight, iterations=iterations)
    grad_u, grad_weight = torch.autograd.grad(right, (u, weight), grad)
    stored = peers.to_layout(weight, layout)
    v = peer.function("dense_capsules", iterations, layout)(u, stored)
    found = torch.autograd.grad(v, (u, stored), grad)
    torch.testing.assert_close(v, right)
    torch.testing.assert_close(found[0], grad_u)
    torch.testing.assert_close(peers.from_layout(found[1], layout), grad_weight)


@pytest.mark.parametrize("op", ["squash", "predict_votes", "dynamic_routing"])
def test_other_ops(op: str) -> None:
    case = Case("x", op=op, batch=2, in_capsules=4, out_capsules=3, in_dim=2, out_dim=5, dtype="float64")
    inputs = case.inputs()
    for peer in peers.of_op(op):
        torch.testing.assert_close(peer.function(op, 3)(*inputs), getattr(oracle, op)(*inputs))


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match="no baseline of 'em_routing'"):
        peers.PEERS[0].function("em_routing", 3)


def test_expanded_weight_is_counted() -> None:
    plain, expanding = peers.PEERS[0], peers.PEERS[2]
    assert expanding.bytes(10, 8, backward=False) == plain.bytes(10, 8, backward=False) + 80
    assert expanding.bytes(10, 8, backward=True) == plain.bytes(10, 8, backward=True) + 160

"""predict_votes: an example by hand, shared weights."""

from __future__ import annotations

import torch

from caps_kernels.functional import predict_votes


def test_by_hand(backend: str) -> None:
    u = torch.tensor([[[1.0, 2.0]]])
    weight = torch.tensor([[[[1.0, 0.0, -1.0], [0.5, 1.0, 2.0]]]])
    assert torch.equal(predict_votes(u, weight, backend=backend), torch.tensor([[[[2.0, 2.0, 3.0]]]]))


def test_positions_share_the_matrices_of_their_type_in_type_major_order(backend: str) -> None:
    u = torch.ones(1, 6, 1)
    weight = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)
    votes = predict_votes(u, weight, positions=3, backend=backend)
    assert votes.flatten().tolist() == [10, 10, 10, 20, 20, 20]


def test_one_position_a_type_is_the_dense_layer(backend: str) -> None:
    u, weight = torch.randn(2, 6, 3), torch.randn(2, 4, 3, 5)
    expanded = weight.repeat_interleave(3, dim=0)
    shared = predict_votes(u, weight, positions=3, backend=backend)
    torch.testing.assert_close(shared, predict_votes(u, expanded, backend=backend))

"""The baselines: what one writes in PyTorch without this package. Plain autograd, full gradient, none of its ops.

    peer          û by a broadcast matrix product over expanded W, as most public code has it, then multiply-and-sum
    einsum        einsum throughout
    elementwise   û by einsum, then multiply-and-sum
    eager         the better of einsum and elementwise
    compile       the better of torch.compile (default mode) of einsum and of elementwise

Each gets W in the layout in which it is fastest, made outside of the timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = {
    "ijde": (0, 1, 2, 3),
    "idje": (0, 2, 1, 3),
    "ijed": (0, 1, 3, 2),
    "jide": (1, 0, 2, 3),
}
"""Orders of W's dimensions, as permutations of [I, J, D, E]. Each is its own inverse."""


def to_layout(weight: Tensor, layout: str) -> Tensor:
    """W [I, J, D, E] stored in `layout`, contiguous."""
    return weight.detach().permute(LAYOUTS[layout]).contiguous().requires_grad_(weight.requires_grad)


def from_layout(weight: Tensor, layout: str) -> Tensor:
    """W or its gradient, stored in `layout`, as [I, J, D, E]."""
    return weight.permute(LAYOUTS[layout])


def squash(s: Tensor) -> Tensor:
    """v = |s|² / (1 + |s|²) · s / |s| over the last dimension."""
    squared = (s * s).sum(-1, keepdim=True)
    return s * (squared.sqrt() / (1 + squared))


def votes_by_einsum(u: Tensor, weight: Tensor, layout: str) -> Tensor:
    """û [B, I, J, E]."""
    return torch.einsum(f"bid,{layout}->bije", u, weight)


def votes_by_matmul(u: Tensor, weight: Tensor, layout: str) -> Tensor:
    """û [B, I, J, E] with a small product for every sample and pair of capsules."""
    if layout == "ijde":
        return torch.matmul(u[:, :, None, None, :], weight[None]).squeeze(3)
    if layout == "ijed":
        return torch.matmul(weight[None], u[:, :, None, :, None]).squeeze(4)
    # The layout of the 2017 entry: votes [J, B, I, 1, E].
    return torch.matmul(u[None, :, :, None, :], weight[:, None]).squeeze(3).permute(1, 2, 0, 3)


def route_by_einsum(votes: Tensor, iterations: int) -> Tensor:
    """v [B, J, E] from û [B, I, J, E]."""
    logits = votes.new_zeros(votes.shape[:3])
    for iteration in range(iterations):
        v = squash(torch.einsum("bij,bije->bje", logits.softmax(2), votes))
        if iteration < iterations - 1:
            logits = logits + torch.einsum("bije,bje->bij", votes, v)
    return v


def route_by_elements(votes: Tensor, iterations: int) -> Tensor:
    """v [B, J, E] from û [B, I, J, E]."""
    logits = votes.new_zeros(votes.shape[:3])
    for iteration in range(iterations):
        v = squash((logits.softmax(2)[..., None] * votes).sum(1))
        if iteration < iterations - 1:
            logits = logits + (votes * v[:, None]).sum(3)
    return v


Votes = Callable[[Tensor, Tensor, str], Tensor]
Route = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Peer:
    """A baseline, and what it costs at worst, to know before running it whether it fits."""

    name: str
    votes: Votes
    route: Route
    layouts: tuple[str, ...]
    peak_forward: float
    """Peak memory of the forward in bytes of û, above the inputs."""
    peak_both: float
    """The same of forward and backward."""
    expands_weight: bool = False
    """Whether it also holds W once a sample (D û), and its gradient too."""

    def function(self, op: str, iterations: int, layout: str = "ijde") -> Callable[..., Tensor]:
        """The baseline of an op as a function of its input tensors, the weight in `layout`.

        Raises:
            ValueError: it has none of that op.
        """
        if op == "dense_capsules":
            return lambda u, weight: self.route(self.votes(u, weight, layout), iterations)
        if op == "predict_votes":
            return lambda u, weight: self.votes(u, weight, layout)
        if op == "dynamic_routing":
            return lambda votes: self.route(votes, iterations)
        if op == "squash":
            return squash
        raise ValueError(f"no baseline of {op!r}")

    def bytes(self, votes_bytes: float, in_dim: int, *, backward: bool) -> float:
        """An estimate of the peak memory of one call above its inputs.

        Args:
            votes_bytes: of one û.
            in_dim: D.
            backward: of forward and backward, not of the forward alone.
        """
        weight = (2 if backward else 1) * in_dim if self.expands_weight else 0
        return votes_bytes * ((self.peak_both if backward else self.peak_forward) + weight)


_EINSUM_LAYOUTS = ("idje", "ijde", "ijed")
PEERS = (
    Peer("einsum", votes_by_einsum, route_by_einsum, _EINSUM_LAYOUTS, 2, 5),
    Peer("elementwise", votes_by_einsum, route_by_elements, _EINSUM_LAYOUTS, 2, 5),
    Peer("peer", votes_by_matmul, route_by_elements, ("ijde", "ijed", "jide"), 2, 5, expands_weight=True),
)
OF_OP = {
    "dense_capsules": ("einsum", "elementwise", "peer"),
    "predict_votes": ("einsum", "peer"),
    "dynamic_routing": ("einsum", "elementwise"),
    "squash": ("elementwise",),
}
"""Which baselines an op has."""
EAGER = ("einsum", "elementwise")
"""The better of these is called "eager", the better of their compilations "compile"."""


def of_op(op: str) -> list[Peer]:
    """The baselines of an op."""
    return [peer for peer in PEERS if peer.name in OF_OP[op]]

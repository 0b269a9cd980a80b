"""Dynamic routing and its gradients in plain PyTorch: the specification.

Forward is procedure 1 of the paper. Backward is derived in this folder's README.md; its symbols are used here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caps_kernels.ops.precision import accumulate
from caps_kernels.ops.squash import reference as squash

Results = tuple[Tensor, Tensor, Tensor]


def forward(
    votes: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> Results:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    votes = accumulate(votes)  # [B, I, J, E]
    logits = votes.new_zeros(votes.shape[:3])  # [B, I, J]
    totals = []
    for iteration in range(iterations):
        coupling = _softmax(logits, leaky)  # [B, I, J]
        if routing_grad == "last":
            coupling = coupling.detach()  # [B, I, J], second derivatives go through this function
        s = torch.einsum("bij,bije->bje", coupling, votes)  # [B, J, E]
        s = s if bias is None else s + accumulate(bias)  # [B, J, E]
        totals.append(s)
        (v,) = squash.forward(s, -1)  # [B, J, E]
        if iteration < iterations - 1:
            logits = logits + torch.einsum("bije,bje->bij", votes, v)  # [B, I, J]
    if not return_coupling:
        coupling = coupling.new_empty(coupling.shape[0], 0, coupling.shape[2])
    return v, torch.stack(totals), coupling


def backward(
    grad_v: Tensor,
    votes: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor]:
    """grad_votes [B, I, J, E] and grad_bias [J, E] (empty where there is no bias), from the saved s [R, B, J, E]."""
    votes = accumulate(votes)  # [B, I, J, E]
    (v,) = squash.forward(s, -1)  # [R, B, J, E]
    total_v = v.cumsum(0)  # [R, B, J, E], V^t = v^1 + … + v^t
    grad_votes = torch.zeros_like(votes)  # [B, I, J, E]
    grad_bias = s.new_zeros(s.shape[1:])  # [B, J, E]
    gv = accumulate(grad_v)  # [B, J, E]
    grad_total = torch.zeros_like(gv)  # [B, J, E], Σ of gV over the iterations done

    for t in reversed(range(iterations)):
        (g,) = squash.backward(gv, s[t], -1)  # [B, J, E]
        grad_bias = grad_bias + g  # [B, J, E]
        coupling = _coupling(votes, total_v, t, leaky)  # [B, I, J]
        if routing_grad == "last":
            coupling = coupling.detach()  # [B, I, J], a constant for second derivatives too
        grad_votes = grad_votes + coupling[..., None] * g[:, None]  # [B, I, J, E]
        if t == 0 or routing_grad == "last":
            break
        gc = torch.einsum("bje,bije->bij", g, votes)  # [B, I, J]
        gb = coupling * (gc - (coupling * gc).sum(2, keepdim=True))  # [B, I, J]
        grad_votes = grad_votes + gb[..., None] * total_v[t - 1][:, None]  # [B, I, J, E]
        grad_total = grad_total + torch.einsum("bij,bije->bje", gb, votes)  # [B, J, E]
        gv = grad_total  # [B, J, E]

    total_bias = grad_bias.sum(0) if bias is not None else grad_bias.new_empty(0)  # [J, E]
    return grad_votes, total_bias


def _coupling(votes: Tensor, total_v: Tensor, t: int, leaky: bool) -> Tensor:
    """c^t [B, I, J]: the softmax of b^t_ij = û_ij · V^{t-1}_j, where V^{-1} is 0."""
    if t == 0:
        return _softmax(votes.new_zeros(votes.shape[:3]), leaky)
    return _softmax(torch.einsum("bije,bje->bij", votes, total_v[t - 1]), leaky)


def _softmax(logits: Tensor, leaky: bool) -> Tensor:
    """Coupling coefficients [B, I, J]; leaky ones leave a share to one more parent, whose logit is 0."""
    if not leaky:
        return logits.softmax(2)
    return torch.nn.functional.pad(logits, (1, 0)).softmax(2)[..., 1:]

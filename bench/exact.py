"""The right answer in float64 for any size: û is made in chunks of lower capsules and never held whole.

An implementation of its own, after the equations of DESIGN: b^t = û·(v¹ + … + v^{t-1}), and the backward derived in
caps_kernels/ops/dense_capsules/README.md. tests/bench holds it against autograd through plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case

CHUNK_BYTES = 256 * 2**20
"""Of û and W in float64; some five tensors of this size are alive at once."""
SAMPLED_VOTES = 5e7
"""Elements of û beyond which a few samples stand for all."""


@dataclass
class Exact:
    """Results for some samples: the output, and how far given gradients are from the right ones."""

    samples: list[int]
    output: Tensor
    """Of `samples`, float64."""
    gradient_errors: Callable[[Sequence[Tensor]], list[float]]
    """Max-norm relative errors of the gradients of all inputs, given for the whole batch."""


def pick_samples(case: Case) -> list[int]:
    """All samples where that is affordable, else at least the first and the last, spread evenly."""
    affordable = max(2, int(SAMPLED_VOTES * case.batch / max(1, case.votes)))
    if affordable >= case.batch:
        return list(range(case.batch))
    return sorted({round(k * (case.batch - 1) / (affordable - 1)) for k in range(affordable)})


def mask(case: Case, grad_output: Tensor) -> Tensor:
    """`grad_output` with zeros for the samples that are not checked, so that W's gradient is a sum over the others."""
    kept = torch.zeros_like(grad_output)
    samples = pick_samples(case)
    kept[samples] = grad_output[samples]
    return kept


def solve(case: Case, inputs: Sequence[Tensor], grad_output: Tensor) -> Exact:
    """The right output, and a judge of gradients for `mask(case, grad_output)`."""
    samples = pick_samples(case)
    if case.op in ("squash", "predict_votes"):
        return _plain(case, inputs, grad_output, samples)
    routing = _Routing(case, inputs, samples)
    output = routing.forward()
    return Exact(samples, output, lambda given: routing.gradient_errors(given, grad_output))


def relative(given: Tensor, right: Tensor) -> float:
    """The largest difference over the largest magnitude; inf where `given` is not finite."""
    difference = float((given.detach().double() - right).abs().max()) if right.numel() else 0.0
    scale = float(right.abs().max()) if right.numel() else 1.0
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def _plain(case: Case, inputs: Sequence[Tensor], grad_output: Tensor, samples: list[int]) -> Exact:
    """squash and predict_votes, whose gradients autograd may find."""
    exact = [inputs[0][samples].detach().double().requires_grad_()]
    exact += [tensor.detach().double().requires_grad_() for tensor in inputs[1:]]
    if case.op == "squash":
        output = _squash(exact[0])
    else:
        matrices = exact[1].repeat_interleave(case.positions, 0)
        output = torch.einsum("bid,ijde->bije", exact[0], matrices)
    right = torch.autograd.grad(output, exact, grad_output[samples].double())

    def errors(given: Sequence[Tensor]) -> list[float]:
        return [
            relative(given[0][samples], right[0]),
            *(relative(g, r) for g, r in zip(given[1:], right[1:], strict=True)),
        ]

    return Exact(samples, output.detach(), errors)


def _squash(s: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return s * length / (1 + length * length)


def _squash_backward(s: Tensor, grad_v: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        (grad_s,) = torch.autograd.grad(_squash(leaf), leaf, grad_v)
    return grad_s


class _Routing:
    """dense_capsules or dynamic_routing on some samples, one chunk of lower capsules at a time."""

    def __init__(self, case: Case, inputs: Sequence[Tensor], samples: list[int]) -> None:
        self.case, self.samples = case, samples
        self.dense = case.op == "dense_capsules"
        self.inputs = [tensor.detach() for tensor in inputs]
        self.bias = self.inputs[-1].double() if case.bias else None
        self.rows = self.inputs[0][samples]
        rows = max(1, len(samples)) + (case.in_dim if self.dense else 0)
        size = 8 * rows * case.out_capsules * case.out_dim
        # Whole types at a time, so that a chunk's gradient of W is complete.
        types = max(1, CHUNK_BYTES // (size * case.positions))
        self.step = int(types) * case.positions
        self.s: list[Tensor] = []

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """For every chunk: its capsules, u, W of each capsule (both empty for dynamic_routing) and û, in float64."""
        empty = torch.empty(0)
        for start in range(0, self.case.in_capsules, self.step):
            chunk = slice(start, min(start + self.step, self.case.in_capsules))
            if not self.dense:
                yield chunk, empty, empty, self.rows[:, chunk].double()
                continue
            types = slice(chunk.start // self.case.positions, chunk.stop // self.case.positions)
            u = self.rows[:, chunk].double()
            weight = self.inputs[1][types].double().repeat_interleave(self.case.positions, 0)
            yield chunk, u, weight, torch.einsum("bid,ijde->bije", u, weight)

    def _coupling(self, votes: Tensor, summed: Tensor) -> Tensor:
        logits = torch.einsum("bije,bje->bij", votes, summed)
        if self.case.leaky:
            logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=2)
        return logits.softmax(2)[..., : votes.shape[2]]

    def forward(self) -> Tensor:
        """v of the samples."""
        case = self.case
        summed = torch.zeros(
            len(self.samples), case.out_capsules, case.out_dim, dtype=torch.float64, device=self.rows.device
        )
        self.s, v = [], summed
        for _ in range(case.iterations):
            s = torch.zeros_like(summed)
            for _, _, _, votes in self._chunks():
                s += torch.einsum("bij,bije->bje", self._coupling(votes, summed), votes)
            s = s if self.bias is None else s + self.bias
            self.s.append(s)
            v = _squash(s)
            summed = summed + v
        return v

    def gradient_errors(self, given: Sequence[Tensor], grad_output: Tensor) -> list[float]:
        """Errors of the gradients of u, W and bias, or of votes and bias."""
        grad_s = self._grad_s(grad_output[self.samples].double())
        differences, scales = [0.0] * len(given), [0.0] * len(given)

        def compare(index: int, part: Tensor, right: Tensor) -> None:
            difference = (part.detach().double() - right).abs().max().item()
            differences[index] = max(differences[index], difference if difference == difference else float("inf"))
            scales[index] = max(scales[index], right.abs().max().item())

        for chunk, u, weight, votes in self._chunks():
            grad_votes = self._grad_votes(votes, grad_s)
            if not self.dense:
                compare(0, given[0][self.samples][:, chunk], grad_votes)
                continue
            positions = self.case.positions
            types = slice(chunk.start // positions, chunk.stop // positions)
            compare(0, given[0][self.samples][:, chunk], torch.einsum("bije,ijde->bid", grad_votes, weight))
            grad_weight = torch.einsum("bid,bije->ijde", u, grad_votes)
            compare(1, given[1][types], grad_weight.unflatten(0, (-1, positions)).sum(1))
        if self.bias is not None:
            compare(len(given) - 1, given[-1], sum(g.sum(0) for g in grad_s if g is not None))  # type: ignore[arg-type]
        return [d / s if s else d for d, s in zip(differences, scales, strict=True)]

    def _grad_s(self, grad_v: Tensor) -> list[Tensor | None]:
        """g^t, the gradient reaching s^t, for every iteration; None where none does."""
        last = self.case.iterations - 1
        grads_v = [torch.zeros_like(grad_v) for _ in range(last)] + [grad_v]
        grads_s: list[Tensor | None] = [None] * (last + 1)
        for t in range(last, -1, -1):
            grad_s = grads_s[t] = _squash_backward(self.s[t], grads_v[t])
            if self.case.routing_grad == "last":
                break
            if t == 0:
                continue
            grad_summed = torch.zeros_like(grad_v)
            for _, _, _, votes in self._chunks():
                coupling = self._coupling(votes, self._summed(t))
                grad_logits = self._grad_logits(votes, coupling, grad_s)
                grad_summed += torch.einsum("bij,bije->bje", grad_logits, votes)
            for earlier in range(t):
                grads_v[earlier] = grads_v[earlier] + grad_summed
        return grads_s

    def _grad_votes(self, votes: Tensor, grads_s: Sequence[Tensor | None]) -> Tensor:
        total = torch.zeros_like(votes)
        for t, grad_s in enumerate(grads_s):
            if grad_s is None:
                continue
            summed = self._summed(t)
            coupling = self._coupling(votes, summed)
            total += coupling[..., None] * grad_s[:, None]
            if t > 0 and self.case.routing_grad == "full":
                total += self._grad_logits(votes, coupling, grad_s)[..., None] * summed[:, None]
        return total

    def _summed(self, t: int) -> Tensor:
        """V of iteration t, the sum of the v before it."""
        return sum((_squash(s) for s in self.s[:t]), torch.zeros_like(self.s[0]))

    @staticmethod
    def _grad_logits(votes: Tensor, coupling: Tensor, grad_s: Tensor) -> Tensor:
        grad_coupling = torch.einsum("bije,bje->bij", votes, grad_s)
        return coupling * (grad_coupling - (coupling * grad_coupling).sum(2, keepdim=True))

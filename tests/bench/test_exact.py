"""The judge of everybody: held against autograd through loops, and able to say no."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import exact
from bench.cases import Case
from tests import oracle

SIZES: dict[str, Any] = {"batch": 3, "in_capsules": 6, "out_capsules": 3, "in_dim": 2, "out_dim": 4, "dtype": "float64"}
CASES = [
    Case("plain", **SIZES),
    Case("last", routing_grad="last", bias=True, **SIZES),
    Case("everything", positions=3, leaky=True, bias=True, iterations=4, **SIZES),
    Case("one", iterations=1, bias=True, **SIZES),
    Case("routing", op="dynamic_routing", bias=True, **SIZES),
    Case("squash", op="squash", **SIZES),
    Case("votes", op="predict_votes", positions=2, **SIZES),
]


def _right(case: Case) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Inputs, output, masked gradient of the output, gradients."""
    inputs = case.inputs()
    output = getattr(oracle, case.op)(**dict(zip(case.shapes(), inputs, strict=True)), **case.options)
    grad_output = exact.mask(case, case.grad_output())
    return inputs, output, grad_output, list(torch.autograd.grad(output, inputs, grad_output))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("samples", ["all", "some"])
def test_agrees_with_autograd(case: Case, samples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "CHUNK_BYTES", 1)
    if samples == "some":
        monkeypatch.setattr(exact, "SAMPLED_VOTES", 1)
    inputs, output, grad_output, gradients = _right(case)
    found = exact.solve(case, inputs, grad_output)
    assert found.samples == ([0, 1, 2] if samples == "all" else [0, 2])
    torch.testing.assert_close(found.output, output[found.samples])
    errors = found.gradient_errors(gradients)
    assert len(errors) == len(inputs)
    assert max(errors) < 1e-14


def test_a_chunk_holds_no_more_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("wide", batch=2, in_capsules=40, out_capsules=3, in_dim=16, out_dim=4)
    monkeypatch.setattr(exact, "CHUNK_BYTES", 8 * 12 * (2 + 16) * 5)
    chunks = list(exact._Routing(case, case.inputs(), [0, 1])._chunks())
    assert [chunk.stop - chunk.start for chunk, *_ in chunks] == [5] * 8
    assert all(weight.nbytes + votes.nbytes <= exact.CHUNK_BYTES for _, _, weight, votes in chunks)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_notices_a_wrong_element(case: Case) -> None:
    inputs, _, grad_output, gradients = _right(case)
    judge = exact.solve(case, inputs, grad_output).gradient_errors
    for index, gradient in enumerate(gradients):
        for value in (float(gradient.flatten()[-1]) + 1, float("nan")):
            spoiled = [each.clone() for each in gradients]
            spoiled[index].view(-1)[-1] = value
            errors = judge(spoiled)
            assert errors[index] > 1e-3
            assert all(error < 1e-14 for k, error in enumerate(errors) if k != index)


def test_relative_error() -> None:
    right = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert exact.relative(torch.tensor([1.0, -3.0]), right) == 0.25
    assert exact.relative(torch.tensor([float("nan"), -4.0]), right) == float("inf")

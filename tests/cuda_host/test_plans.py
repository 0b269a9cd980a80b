"""How ops of backend "cuda" are launched: how often, and on devices with fewer abilities than others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from caps_kernels.ops.dynamic_routing import cuda as routing
from tests.cases import Case, dynamic_routing, predict_votes, squash
from tests.cuda_host import host
from tests.cuda_host.test_ops import run
from tests.test_op_contract import assert_near, gradients

HELD = dynamic_routing("held", 3, 70, 3, 4, bias=True)
SPLIT = dynamic_routing("split", 3, 70, 3, 5, bias=True)
SAMPLES = dynamic_routing("samples", 5, 9, 3, 5, bias=True)


def launches(case: Case, **settings: int) -> int:
    """Of forward and backward together."""
    library = host.load(case.op)
    with library.settings(**settings):
        library.launches()
        run(case, case.inputs(torch.float32, requires_grad=False))
        return library.launches()


@pytest.mark.parametrize(
    ("case", "settings", "wanted"),
    [
        (squash("plain", 3, 4), {}, 2),
        (squash("empty", 0, 4), {}, 0),
        (predict_votes("plain", 3, 4, 2, 3, 5), {}, 3),
        (predict_votes("chunks", 5, 26, 1, 2, 4, positions=13), {}, 4),
        # One for both gradients, and one for the sums of chunks.
        (predict_votes("together", 3, 4, 4, 3, 16), {}, 2),
        (predict_votes("together-chunks", 5, 26, 4, 2, 16, positions=13), {}, 3),
        # Forward and backward of a launch each; grad_bias joins samples, for which blocks of whole samples cannot wait.
        (HELD, {}, 2),
        (SPLIT, {}, 2),
        (SAMPLES, {}, 3),
        # A launch for each of 2R steps, and one more for grad_bias.
        (HELD, {"cooperative": 0}, 13),
        (SPLIT, {"cooperative": 0}, 13),
        (SAMPLES, {"cooperative": 0}, 3),
    ],
    ids=str,
)
def test_launches_are_as_many_as_the_documents_say(
    case: Case, settings: dict[str, int], wanted: int, raw_ops: None
) -> None:
    assert launches(case, **settings) == wanted


@pytest.mark.parametrize("numbers", [4, 5], ids=["registers", "split"])
@pytest.mark.parametrize("routing_grad", ["full", "last"])
@pytest.mark.parametrize(
    "settings",
    [{"cooperative": 0}, {"processors": 1, "blocks_a_processor": 1}, {"processors": 20, "blocks_a_processor": 1}],
    ids=str,
)
def test_results_are_the_same_bits_on_every_device(
    settings: dict[str, int], routing_grad: str, numbers: int, raw_ops: None
) -> None:
    case = dynamic_routing("split", 3, 70, 3, numbers, bias=True, leaky=True, routing_grad=routing_grad)
    inputs = case.inputs(torch.float32, requires_grad=False)
    library = host.load(case.op)
    wanted = run(case, inputs)
    with library.settings(**settings):
        for one, other in zip(run(case, inputs), wanted, strict=True):
            assert torch.equal(one, other)


def test_a_launch_that_fails_is_an_error_that_names_the_op(raw_ops: None) -> None:
    case = dynamic_routing("split", 3, 70, 3, 4)
    inputs = case.inputs(torch.float32, requires_grad=False)
    with (
        host.load(case.op).settings(refuse=1),
        pytest.raises(RuntimeError, match='dynamic_routing on backend "cuda": too many blocks in cooperative launch'),
    ):
        run(case, inputs)
    run(case, inputs)


@pytest.mark.parametrize("op", ["squash", "predict_votes", "dynamic_routing"])
def test_inputs_that_are_not_aligned_are_read_all_the_same(op: str, raw_ops: None) -> None:
    cases: dict[str, Any] = {
        "squash": squash("plain", 6, 8),
        "predict_votes": predict_votes("plain", 3, 4, 2, 3, 8),
        "dynamic_routing": dynamic_routing("plain", 3, 4, 2, 8),
    }
    case = cases[op]
    shifted = []
    for tensor in case.inputs(torch.float32, requires_grad=False):
        memory = torch.full((tensor.numel() + 1,), float("nan"))
        shifted.append(memory[1:].view(tensor.shape).copy_(tensor))
        assert shifted[-1].data_ptr() % 16 != 0
    host.load(op)
    exact = [t.double().requires_grad_() for t in shifted]
    wanted = case.call(exact, "reference")
    results = run(case, shifted)
    assert_near(results[0], wanted, 5e-6, "result")
    assert_near(results[3 if op == "dynamic_routing" else 1], gradients(wanted, exact)[0], 2e-5, "gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("parents", "numbers"),
    [
        (10, 16),
        (11, 16),
        (12, 16),
        (13, 16),
        (40, 16),
        (41, 16),
        (64, 16),
        (65, 16),
        (10, 15),
        (10, 24),
        (2, 128),
        (2, 512),
    ],
)
def test_explain_knows_what_registers_hold(parents: int, numbers: int, dtype: torch.dtype, raw_ops: None) -> None:
    host.load("dynamic_routing")
    votes = torch.empty(2, 2 * 5, parents, numbers, dtype=dtype)
    for given in (votes, votes[:, ::2], votes.transpose(1, 2).contiguous().transpose(1, 2), votes[..., ::2]):
        # Only these need no shared memory.
        planned = torch.ops.caps_kernels_cuda_host.dynamic_routing_shared(given, 3) == (0, 0)
        assert routing.regime(given).startswith("registers") == planned

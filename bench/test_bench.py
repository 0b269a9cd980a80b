"""The same cases under pytest-benchmark: `pytest bench --benchmark-only -k main`, with its --benchmark-compare.

No warm heap here: set the variables of `bench.machine.WARM_HEAP` for numbers to compare with those of run.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import machine, measure
from bench.cases import CASES, Case
from bench.clock import Clock
from bench.contenders import Contender, Limits, build
from bench.peers import EAGER, OF_OP
from caps_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Ready:
    """A contender that has passed its check."""

    contender: Contender
    grad_output: torch.Tensor


def _names(case: Case) -> list[str]:
    peers = OF_OP[case.op] if case.peers else ()
    compiled = [f"compile {name}" for name in EAGER if case.compile and name in peers]
    return [*backends.available(), *peers, *compiled]


_PAIRS = [pytest.param((case, name), id=f"{case.name}-{name}") for case in CASES for name in _names(case)]


@pytest.fixture(scope="module", params=_PAIRS)
def ready(request: pytest.FixtureRequest) -> Ready:
    """Inputs and a contender, checked against float64; skipped where it cannot run or does not fit."""
    case: Case
    case, name = request.param
    size = 3 * sum(torch.Size(shape).numel() for shape in case.shapes().values()) * case.torch_dtype.itemsize
    if size + 2**31 > machine.available_memory(DEVICE):
        pytest.skip("not enough memory")
    grad_output = case.grad_output(DEVICE)
    present, absent = build(case, case.inputs(DEVICE), Limits.here(device=DEVICE), only=[name])
    if not present:
        pytest.skip(absent[0].reason if absent else f"{name} does not run {case.op}")
    outcomes = {name: measure.Outcome(name, present[0].ours)}
    measure.check(case, present, outcomes, grad_output)
    wrong = outcomes[name].failed.get("forward")
    if wrong is not None:
        pytest.fail(wrong)
    return Ready(present[0], grad_output)


def test_forward(benchmark: BenchmarkFixture, ready: Ready) -> None:
    """The forward under no_grad."""
    arguments = (ready.contender, "forward", ready.grad_output, Clock(DEVICE), 1)
    benchmark.pedantic(measure.sample, arguments, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]


def test_both(benchmark: BenchmarkFixture, ready: Ready) -> None:
    """Forward and backward."""
    if "both" in ready.contender.refused:
        pytest.skip(ready.contender.refused["both"])
    arguments = (ready.contender, "both", ready.grad_output, Clock(DEVICE), 1)
    benchmark.pedantic(measure.sample, arguments, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]

"""Work goes to the tensors' device and its current stream, waits for nothing on the host, and can be captured."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from caps_kernels import backends
from tests.cases import Case
from tests.gpu.steps import CASES, SMALL, grad_output, step

pytestmark = pytest.mark.usefixtures("cuda")
CYCLES = 1_000_000_000
"""Half a second or more of a GPU's time."""


def test_work_is_queued_on_the_current_stream_without_waiting(op: str, backend: str) -> None:
    case = CASES[op]
    inputs = case.inputs(torch.float32, "cuda")
    grad = grad_output(case, inputs)
    wanted = step(case, inputs, grad, backend)  # compiles, too
    late = [torch.zeros_like(t).requires_grad_() for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(case, late, grad, backend)  # so that the stream has memory to give
        stream.synchronize()
        torch.cuda._sleep(CYCLES)
        with torch.no_grad():
            for to, source in zip(late, inputs, strict=True):
                to.copy_(source)
        # What does not queue behind the copies finds zeros.
        got = step(case, late, grad, backend)
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_the_current_device_may_be_another_than_the_tensors(op: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    case = CASES[op]
    wanted = None
    for device in ("cuda:0", "cuda:1"):
        inputs = case.inputs(torch.float32, device)
        grad = grad_output(case, inputs)
        with torch.cuda.device(0):
            got = [t.cpu() for t in step(case, inputs, grad, backend)]
            assert torch.cuda.current_device() == 0
        if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1) and wanted is not None:
            for mine, theirs in zip(got, wanted, strict=True):
                assert torch.equal(mine, theirs)
        for mine, theirs in zip(got, step(case, inputs, grad, "reference"), strict=True):
            assert torch.allclose(mine, theirs.cpu(), rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
        wanted = got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_can_be_captured_and_replayed(op: str, backend: str, dtype: torch.dtype) -> None:
    case = CASES[op]
    inputs = case.inputs(dtype, "cuda")
    grad = grad_output(case, inputs)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as torch's own documents have it
        for _ in range(3):
            step(case, inputs, grad, backend)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, inputs, grad, backend)
    for seed in (1, 2):
        with torch.no_grad():
            for tensor, fresh in zip(inputs, case.inputs(dtype, "cuda", seed=seed), strict=True):
                tensor.copy_(fresh)
        graph.replay()
        replayed = [t.clone() for t in captured]
        for mine, theirs in zip(replayed, step(case, inputs, grad, backend), strict=True):
            assert torch.equal(mine, theirs)


def test_compiled_programs_may_use_graphs(op: str, backend: str) -> None:
    case = CASES[op]
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: case.call(t, backend) * 2, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        inputs = case.inputs(torch.float32, "cuda", seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*inputs)
        gradients = torch.autograd.grad(result, inputs, torch.ones_like(result))
        eager = case.call(inputs, backend) * 2
        wanted = torch.autograd.grad(eager, inputs, torch.ones_like(eager))
        for mine, theirs in zip((result, *gradients), (eager, *wanted), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("calls", "repeats"), [(CASES, 20), (SMALL, 300)], ids=["many-tiles", "small"])
def test_results_are_the_same_bits_every_time(
    op: str, backend: str, calls: Mapping[str, Case], repeats: int, dtype: torch.dtype
) -> None:
    case = calls[op]
    inputs = case.inputs(dtype, "cuda")
    grad = grad_output(case, inputs)
    first = step(case, inputs, grad, backend)
    for _ in range(repeats):
        for mine, theirs in zip(step(case, inputs, grad, backend), first, strict=True):
            assert torch.equal(mine, theirs)


def test_an_explanation_names_the_regime(op: str, backend: str) -> None:
    case = CASES[op]
    named = dict(zip(case.shapes, case.inputs(torch.float32, "cuda"), strict=True))
    verdict = next(v for v in backends.explain(op, **named, **case.options, backend=backend) if v.backend == backend)
    assert verdict.chosen
    assert verdict.regime

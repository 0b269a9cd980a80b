"""What every op promises on every backend that can run here: one file for all of them.

A backend under development needs nothing more than its registration to be held to all of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from caps_kernels import backends
from tests import oracle
from tests.cases import CASES, SMOKE, Case

RUNS = [(case, name) for case in CASES for name in backends.BACKENDS if backends.lacking(case.op, name) is None]
SMALL_RUNS = [(case, name) for case, name in RUNS if case.options.get("iterations", 3) <= 3]
SMOKE_RUNS = [(case, name) for case, name in RUNS if case in SMOKE]
ROUTING_OPS = ("dynamic_routing", "dense_capsules")


def over(runs: Sequence[tuple[Case, str]]) -> pytest.MarkDecorator:
    """Run a test for each of some cases and backends."""
    return pytest.mark.parametrize(("case", "backend"), runs, ids=[f"{case}-{backend}" for case, backend in runs])


every_case = over(RUNS)
small_case = over(SMALL_RUNS)
smoke_case = over(SMOKE_RUNS)
routing_case = over([(case, name) for case, name in RUNS if case.op in ROUTING_OPS])
# With routing_grad="last" a gradient is not the derivative of the function, by definition: the oracle judges it alone.
full_case = over([(case, name) for case, name in RUNS if case.options.get("routing_grad") != "last"])
full_smoke_case = over([(case, name) for case, name in SMOKE_RUNS if case.options.get("routing_grad") != "last"])
sample_case = over([(case, name) for case, name in SMOKE_RUNS if case.op != "squash"])

RTOL = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest error relative to the largest element. For 16-bit inputs it covers the rounding of inputs and results."""


INTERPRETED = "triton" if backends.TRITON_INTERPRETS else None
"""The backend whose every call takes a second: numerical derivatives of it are taken along one direction."""


def device_of(backend: str) -> str:
    devices = backends.BACKENDS[backend].devices
    return "cpu" if devices is None or "cpu" in devices else "cuda"


def weighted_sum(result: Tensor) -> Tensor:
    """A scalar whose gradient reaches every element of the result with another weight."""
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype, device=result.device)
    return (result * weights.view(result.shape)).sum()


def gradients(result: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weighted_sum(result), inputs)


def assert_near(got: Tensor, wanted: Tensor, rtol: float, what: str) -> None:
    assert got.shape == wanted.shape, what
    if wanted.numel() == 0:
        return
    exact = wanted.detach().cpu().double()
    scale = float(exact.abs().max()) or 1.0
    error = float((got.detach().cpu().double() - exact).abs().max()) / scale
    assert error <= rtol, f"{what}: relative error {error:.2e} > {rtol:.0e}"


def wanted_of(case: Case, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The oracle's result and gradients for the very numbers of `inputs`, rounded as they are, in float64."""
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    named = dict(zip(case.shapes, exact, strict=True))
    result = getattr(oracle, case.op)(**named, **case.options)
    if result.numel() == 0:
        return result, tuple(torch.zeros_like(t) for t in exact)
    return result, gradients(result, exact)


@every_case
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_values_and_gradients_match_the_oracle(case: Case, backend: str, dtype: torch.dtype, permuted: bool) -> None:
    inputs = case.inputs(dtype, device_of(backend), permuted=permuted)
    wanted, wanted_gradients = wanted_of(case, inputs)
    result = case.call(inputs, backend)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert_near(result, wanted, RTOL[dtype], "result")
    for name, got, want in zip(case.shapes, gradients(result, inputs), wanted_gradients, strict=True):
        assert got.dtype == dtype
        assert_near(got, want, 4 * RTOL[dtype], f"gradient of {name}")


@routing_case
def test_returned_coupling_is_the_last_softmax(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend))
    v, coupling = case.call(inputs, backend, return_coupling=True)
    named = dict(zip(case.shapes, inputs, strict=True))
    wanted_v, wanted = getattr(oracle, case.op)(**named, **case.options, return_coupling=True)
    assert_near(v, wanted_v, 1e-12, "v")
    assert_near(coupling, wanted, 1e-12, "coupling")
    assert not coupling.requires_grad


@full_case
def test_gradcheck(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend))
    assert torch.autograd.gradcheck(lambda *t: case.call(t, backend), inputs, fast_mode=backend == INTERPRETED)


@small_case
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck_of_forward_and_backward(case: Case, backend: str, permuted: bool) -> None:
    inputs = case.inputs(device=device_of(backend), permuted=permuted)
    args = prepared(case, inputs)
    forward, backward = raw_ops(case.op)
    opcheck(forward, (*args, backend))
    results = as_tuple(forward(*[detached(a) for a in args], backend))
    grad = torch.ones_like(results[0])
    # Its own gradients are the reference's whatever the backend, and compared with the oracle's below.
    tensors = [detached(a) for a in args if a is None or isinstance(a, Tensor)]
    options = args[len(tensors) :]
    opcheck(backward, (grad, *tensors, *saved(case.op, results), *options, backend))


@small_case
def test_compile_without_graph_breaks(case: Case, backend: str, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda *t: case.call(t, backend), fullgraph=True, backend="aot_eager")
    inputs = case.inputs(device=device_of(backend))
    result = compiled(*inputs)
    eager = case.call(inputs, backend)
    assert torch.equal(result, eager)
    for got, want in zip(gradients(result, inputs), gradients(eager, inputs), strict=True):
        assert_near(got, want, 1e-12, "gradient")


@smoke_case
def test_compile_with_inductor_and_dynamic_shapes(case: Case, backend: str, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda *t: case.call(t, backend).square(), fullgraph=True, dynamic=True)
    for seed in range(2):
        inputs = case.inputs(device=device_of(backend), seed=seed)
        result = compiled(*inputs)
        eager = case.call(inputs, backend).square()
        assert_near(result, eager, 1e-12, "result")
        for got, want in zip(gradients(result, inputs), gradients(eager, inputs), strict=True):
            assert_near(got, want, 1e-12, "gradient")


@smoke_case
def test_export_keeps_values_and_names_the_backend(case: Case, backend: str) -> None:
    class Program(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return case.call(tensors, backend)

    inputs = case.inputs(device=device_of(backend))
    program = torch.export.export(Program(), tuple(t.detach() for t in inputs))
    nodes = [n for n in program.graph.nodes if n.target is raw_ops(case.op)[0]]
    assert [n.args[-1] for n in nodes] == [backend]
    result = program.module()(*inputs)
    eager = case.call(inputs, backend)
    assert torch.equal(result, eager)
    for got, want in zip(gradients(result, inputs), gradients(eager, inputs), strict=True):
        assert_near(got, want, 1e-12, "gradient of the exported program")


@smoke_case
def test_vmap_over_any_tensor_equals_a_loop(case: Case, backend: str) -> None:
    device, count = device_of(backend), 3
    draws = [case.inputs(device=device, seed=seed, requires_grad=False) for seed in range(count)]
    for mapped in range(1, 2 ** len(case.shapes)):
        in_dims = tuple(-1 if mapped >> n & 1 else None for n in range(len(case.shapes)))
        tensors = [
            torch.stack(column, dim=-1) if dim is not None else column[0]
            for column, dim in zip(zip(*draws, strict=True), in_dims, strict=True)
        ]
        got = torch.func.vmap(lambda *t: case.call(t, backend), in_dims)(*tensors)
        loop = [
            case.call([d[n] if dim is not None else draws[0][n] for n, dim in enumerate(in_dims)], backend)
            for d in draws
        ]
        assert_near(got, torch.stack(loop), 1e-12, f"vmap with in_dims {in_dims}")


@smoke_case
def test_func_grad_and_per_sample_gradients_equal_a_loop(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend), requires_grad=False)
    first, *rest = inputs

    def loss(parameters: Sequence[Tensor], sample: Tensor) -> Tensor:
        total: Tensor = case.call([sample[None], *parameters], backend).square().sum()
        return total

    arguments = (rest, first) if rest else ((), first)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(*arguments)
    for n in range(first.shape[0]):
        wanted = torch.func.grad(loss, argnums=(0, 1))(rest, first[n])
        for got, want in zip([*per_sample[0], per_sample[1]], [*wanted[0], wanted[1]], strict=True):
            assert_near(got[n], want, 1e-12, "per-sample gradient")
        leaves = [t.clone().requires_grad_() for t in (*rest, first[n])]
        eager = torch.autograd.grad(loss(leaves[:-1], leaves[-1]), leaves)
        for got, want in zip([*wanted[0], wanted[1]], eager, strict=True):
            assert_near(got, want, 1e-12, "func.grad")


@smoke_case
def test_second_derivatives_are_right(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend))

    def penalty(function: Any, tensors: Sequence[Tensor]) -> Tensor:
        grads = torch.autograd.grad(function(tensors).square().sum(), tensors, create_graph=True)
        total: Tensor = torch.stack([g.square().sum() for g in grads]).sum()
        return total

    def by_oracle(tensors: Sequence[Tensor]) -> Any:
        return getattr(oracle, case.op)(**dict(zip(case.shapes, tensors, strict=True)), **case.options)

    def by_backend(tensors: Sequence[Tensor]) -> Any:
        return case.call(tensors, backend)

    wanted = torch.autograd.grad(penalty(by_oracle, inputs), inputs)
    for got, want in zip(torch.autograd.grad(penalty(by_backend, inputs), inputs), wanted, strict=True):
        assert_near(got, want, 1e-10, "autograd.grad of a gradient penalty")
    penalty(by_backend, inputs).backward()
    for tensor, want in zip(inputs, wanted, strict=True):
        assert tensor.grad is not None
        assert_near(tensor.grad, want, 1e-10, ".backward() of a gradient penalty")

    def nested(first: Tensor) -> Tensor:
        inner = torch.func.grad(lambda t: case.call([t, *rest], backend).square().sum())
        total: Tensor = inner(first).square().sum()
        return total

    first, *rest = [t.detach() for t in inputs]
    leaf = first.clone().requires_grad_()
    grad = torch.autograd.grad(by_oracle([leaf, *rest]).square().sum(), leaf, create_graph=True)[0]
    (want,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert_near(torch.func.grad(nested)(first), want, 1e-10, "func.grad of func.grad")


@full_smoke_case
def test_gradgradcheck(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend))
    assert torch.autograd.gradgradcheck(lambda *t: case.call(t, backend), inputs, fast_mode=backend == INTERPRETED)


@smoke_case
def test_forward_mode_is_refused_clearly(case: Case, backend: str) -> None:
    first, *rest = case.inputs(device=device_of(backend), requires_grad=False)

    def function(t: Tensor) -> Any:
        return case.call([t, *rest], backend).sum()

    with pytest.raises(NotImplementedError, match=f"caps_kernels.{case.op} has no forward-mode derivative"):
        torch.func.jvp(function, (first,), (first,))
    with pytest.raises(NotImplementedError, match="jacrev"):
        torch.func.hessian(function)(first)
    compiled = torch.compile(function, backend="aot_eager")
    with pytest.raises(Exception, match=r"forward-mode|torch\.func"):
        torch.func.jvp(compiled, (first,), (first,))


class Watch(TorchDispatchMode):
    """Notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@smoke_case
def test_who_looks_on_sees_the_op_itself(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend), requires_grad=False)
    with Watch() as watch:
        case.call(inputs, backend)
    assert raw_ops(case.op)[0] in watch.seen
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
    for tensors in (fakes, [t.to("meta") for t in inputs]):
        result = raw_ops(case.op)[0](*prepared(case, tensors), backend)
        assert as_tuple(result)[0].shape == case.call(inputs, backend).shape
    assert case.call([t.to("meta") for t in inputs], "reference").is_meta
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        case.call([forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:]], backend)


@smoke_case
def test_the_bare_op_has_right_gradients_or_refuses(case: Case, backend: str) -> None:
    inputs = case.inputs(device=device_of(backend))
    forward, _ = raw_ops(case.op)
    bare = as_tuple(forward(*prepared(case, inputs), backend))[0]
    wanted = gradients(case.call(inputs, backend), inputs)
    for got, want in zip(gradients(bare, inputs), wanted, strict=True):
        assert_near(got, want, 1e-12, "gradient of the bare op")
    first, *rest = prepared(case, [t.detach() for t in inputs])
    with pytest.raises(NotImplementedError, match=rf"torch\.func.*caps_kernels\.functional\.{case.op}"):
        torch.func.grad(lambda t: as_tuple(forward(t, *rest, backend))[0].sum())(first)


@every_case
def test_every_element_is_written(case: Case, backend: str, nan_filled_memory: None) -> None:
    inputs = case.inputs(device=device_of(backend))
    result = case.call(inputs, backend)
    for tensor in (result, *gradients(result, inputs)):
        assert not tensor.isnan().any()


@every_case
def test_any_forward_goes_with_any_backward(case: Case, backend: str) -> None:
    device = device_of(backend)
    args = prepared(case, case.inputs(device=device, requires_grad=False))
    forward, backward = raw_ops(case.op)
    tensors = [a for a in args if a is None or isinstance(a, Tensor)]
    options = args[len(tensors) :]
    others = [b for c, b in RUNS if c is case and device in (backends.BACKENDS[b].devices or (device,))]
    found = {}
    for other in others:
        results = as_tuple(forward(*args, other))
        grad = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64, device=device).view(results[0].shape)
        found[other] = as_tuple(backward(grad, *tensors, *saved(case.op, results), *options, backend))
    for other in others:
        for got, want in zip(found[other], found["reference"], strict=True):
            assert_near(got, want, 1e-11, f"{other} forward, {backend} backward")


@sample_case
def test_a_sample_does_not_depend_on_its_neighbours(case: Case, backend: str) -> None:
    inputs = case.inputs(torch.float32, device_of(backend))
    changed = [t.detach().clone() for t in inputs]
    changed[0][1:] = float("nan")
    leaves = [t.requires_grad_() for t in changed]
    plain, poisoned = case.call(inputs, backend), case.call(leaves, backend)
    assert torch.equal(plain[0], poisoned[0])
    assert poisoned[1:].isnan().all()
    assert torch.equal(gradients(plain[:1], inputs[:1])[0][0], gradients(poisoned[:1], leaves[:1])[0][0])


@smoke_case
def test_autocast_rounds_inputs_and_nothing_else(case: Case, backend: str) -> None:
    device = device_of(backend)
    inputs = case.inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        result = case.call(inputs, backend)
    rounded = case.call([t.detach().bfloat16() for t in inputs], backend)
    if case.op == "squash":
        assert result.dtype == torch.float32
    else:
        assert torch.equal(result, rounded)
    for grad, tensor in zip(gradients(result, inputs), inputs, strict=True):
        assert grad.dtype == tensor.dtype


def prepared(case: Case, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """The schema's arguments, without the backend."""
    named = dict(zip(case.shapes, inputs, strict=True))
    return backends._PREPARE[case.op](**named, **case.options)


def raw_ops(op: str) -> tuple[Any, Any]:
    namespace = torch.ops.caps_kernels
    return getattr(namespace, f"{op}_fwd").default, getattr(namespace, f"{op}_bwd").default


def saved(op: str, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results[1:2] if op in ROUTING_OPS else ()


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

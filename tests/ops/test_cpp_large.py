"""C++ beyond 2³¹ elements: offsets always, whole tensors on request (`pytest -m long`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.machine import available_memory
from caps_kernels import _extension, backends
from caps_kernels.functional import dense_capsules, dynamic_routing, predict_votes, squash
from tests import cases
from tests.caches import caches_for
from tests.cases import Case
from tests.test_op_contract import RTOL, assert_near

pytestmark = pytest.mark.skipif(
    _extension.MISSING["cpp"] is not None, reason=f"no C++ library: {_extension.MISSING['cpp']}"
)

FAR = 2**31 + 11
"""Elements from one index of a dimension to the next."""
FAR_CASES = (
    cases.squash("rows", 3, 2, 5),
    cases.squash("side-by-side", 2, 3, 5, dim=1),
    cases.predict_votes("own", 3, 4, 2, 3, 5),
    cases.predict_votes("shared", 3, 4, 2, 3, 5, positions=2),
    cases.dynamic_routing("bias", 2, 4, 3, 5, bias=True),
    cases.dense_capsules("rows", 2, 4, 3, 2, 4, bias=True),
    cases.dense_capsules("quads", 5, 5, 3, 12, 4, bias=True),
    cases.dense_capsules("tiles", 3, 4, 3, 2, 5, bias=True),
    cases.dense_capsules("shared", 3, 4, 3, 2, 5, positions=2, bias=True),
)


@pytest.fixture
def regime(case: Case) -> Iterator[str]:
    """The regime of dense_capsules that a case is there for. Quads take no others."""
    with caches_for("quads" if case.name == "quads" else "tiles"):
        yield case.name if case.name in ("rows", "quads") else "tiles"


def layouts(tensor: Tensor, memory: Tensor) -> Iterator[Tensor]:
    """The same numbers in `memory` with each dimension of up to 5 in turn `FAR` elements from index to index."""
    for dim, size in enumerate(tensor.shape):
        if 1 < size <= 5:
            strides = [FAR if n == dim else stride for n, stride in enumerate(tensor.stride())]
            yield memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FAR_CASES, ids=str)
def test_offsets_beyond_2_to_the_31(case: Case, isa: str, dtype: torch.dtype, regime: str, tmp_path: Path) -> None:
    # A file of 43 GB without content, of which only the pages written to take room.
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=5 * FAR, dtype=dtype)
    (tmp_path / "sparse").unlink()
    tensors = [t.detach() for t in case.inputs(dtype)]
    if case.op == "dense_capsules":
        verdicts = {v.backend: v for v in backends.explain(case.op, *tensors, **case.options)}
        assert str(verdicts["cpp"].regime).startswith(regime)
    exact = [t.double().requires_grad_() for t in tensors]
    wanted = case.call(exact, "reference")
    tensors.append(torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    wanted_gradients = torch.autograd.grad(wanted, exact, tensors[-1].double())
    for index, tensor in enumerate(tensors):
        for far in layouts(tensor, memory):
            *inputs, grad = [far if n == index else t for n, t in enumerate(tensors)]
            inputs = [t.detach().requires_grad_() for t in inputs]
            result = case.call(inputs, "cpp")
            what = f"with tensor {index} of strides {far.stride()}"
            assert_near(result, wanted, 2 * RTOL[dtype], f"result {what}")
            found = torch.autograd.grad(result, inputs, grad)
            for name, got, want in zip(case.shapes, found, wanted_gradients, strict=True):
                assert_near(got, want, 8 * RTOL[dtype], f"gradient of {name} {what}")


def needs(gigabytes: float) -> None:
    """Skip the test where less memory is free."""
    free = available_memory() / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of memory, {free:.0f} are free")


CAPSULES = 2**20 + 7
"""In two samples, or of one with twice the numbers, these have just over 2³¹ elements as [CAPSULES, 64, 16]."""


def mostly_zeros(*shape: int) -> Tensor:
    """[..., I, J, E] of zeros but for the last four lower capsules of the last sample.

    Zeros take no memory until they are written, and lower capsules of zero votes change nothing about the others.
    """
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    last = tensor.flatten(0, -3)[-4:]
    last.copy_(torch.randn(last.shape, generator=torch.Generator().manual_seed(0)))
    return tensor


@pytest.mark.long
def test_squash_of_more_than_2_to_the_31_elements() -> None:
    needs(14)
    s = mostly_zeros(2, CAPSULES, 64, 16)
    v = squash(s, backend="cpp")
    assert torch.equal(v[-1, -4:], squash(s[-1, -4:], backend="cpp"))
    assert not v[-1, -64:-4].any()
    del v
    s.requires_grad_()
    last = s[-1, -4:].detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(squash(s, backend="cpp")[-1].square().sum(), s)
    (wanted,) = torch.autograd.grad(squash(last, backend="cpp").square().sum(), last)
    assert torch.equal(grad[-1, -4:], wanted)


@pytest.mark.long
def test_predict_votes_of_more_than_2_to_the_31_elements() -> None:
    needs(10)
    u = torch.arange(2 * CAPSULES).remainder(7).to(torch.bfloat16).view(2, -1, 1).requires_grad_()
    weight = torch.randn(1, 64, 1, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()
    votes = predict_votes(u, weight, positions=CAPSULES, backend="cpp")
    assert torch.equal(votes[-1, -4:].detach(), (u[-1, -4:, :, None] * weight[0, :, 0]).detach())
    grad_votes = mostly_zeros(2, CAPSULES, 64, 16)
    grad_u, grad_weight = torch.autograd.grad(votes, (u, weight), grad_votes)
    last = grad_votes[-1, -4:].double()
    assert_near(grad_u[-1, -4:, 0], (last * weight[0, :, 0].double()).sum((1, 2)), 1e-2, "gradient of u")
    wanted = (last * u[-1, -4:, :, None].double()).sum(0)
    assert_near(grad_weight[0, :, 0], wanted, 1e-2, "gradient of weight")


@pytest.mark.long
def test_dynamic_routing_of_more_than_2_to_the_31_elements() -> None:
    needs(14)
    votes = mostly_zeros(2, CAPSULES, 64, 16).requires_grad_()
    last = votes[-1:, -20:].detach().clone().requires_grad_()
    wanted = dynamic_routing(last, backend="reference")
    v = dynamic_routing(votes, backend="cpp")
    assert_near(v[-1:], wanted, 1e-2, "v")
    (want,) = torch.autograd.grad(wanted.float().square().sum(), last)
    (grad,) = torch.autograd.grad(v[-1].float().square().sum(), votes)
    assert_near(grad[-1:, -20:], want, 1e-2, "gradient of votes")


@pytest.mark.long
def test_dense_capsules_of_more_than_2_to_the_31_elements() -> None:
    needs(10)
    weight = mostly_zeros(CAPSULES, 64, 32).view(CAPSULES, 64, 2, 16).requires_grad_()
    u = torch.randn(1, CAPSULES, 2, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).requires_grad_()
    last = [u[:, -20:].detach().clone().requires_grad_(), weight[-20:].detach().clone().requires_grad_()]
    wanted = dense_capsules(last[0], last[1], backend="reference")
    v = dense_capsules(u, weight, backend="cpp")
    assert_near(v, wanted, 1e-2, "v")
    wanted_gradients = torch.autograd.grad(wanted.float().square().sum(), last)
    found = torch.autograd.grad(v.float().square().sum(), (u, weight))
    assert_near(found[0][:, -20:], wanted_gradients[0], 2e-2, "gradient of u")
    assert_near(found[1][-20:], wanted_gradients[1], 2e-2, "gradient of weight")

"""Any sizes, strides and dtypes, drawn by hypothesis: every backend against the reference in float64."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from caps_kernels import backends
from tests import cases
from tests.test_op_contract import RTOL, assert_near, device_of, gradients

SIZE = st.integers(1, 9)
BATCH = st.integers(0, 5)
DTYPE = st.sampled_from(list(RTOL))
ROUTING = {
    "iterations": st.integers(1, 5),
    "leaky": st.booleans(),
    "routing_grad": st.sampled_from(["full", "last"]),
    "bias": st.booleans(),
}

squash_cases = st.builds(
    lambda shape, dim: cases.squash("drawn", *shape, dim=dim % len(shape) - len(shape)),
    st.lists(SIZE, min_size=1, max_size=4),
    st.integers(0, 3),
)
votes_cases = st.builds(
    lambda b, t, p, j, d, e: cases.predict_votes("drawn", b, t * p, j, d, e, positions=p),
    BATCH, SIZE, st.integers(1, 4), SIZE, SIZE, SIZE,
)  # fmt: skip
routing_cases = st.builds(
    lambda b, i, j, e, **options: cases.dynamic_routing("drawn", b, i, j, e, **options),
    BATCH, SIZE, SIZE, SIZE, **ROUTING,
)  # fmt: skip
dense_cases = st.builds(
    lambda b, t, p, j, d, e, **options: cases.dense_capsules("drawn", b, t * p, j, d, e, positions=p, **options),
    BATCH, SIZE, st.integers(1, 4), SIZE, SIZE, SIZE, **ROUTING,
)  # fmt: skip


def layout(tensor: Tensor, kind: int) -> Tensor:
    """The same numbers: as they are, with gaps and reversed strides, or inside a larger tensor."""
    if kind == 1:
        return cases.with_gaps(tensor)
    if kind == 2:
        padded = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
        return padded[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    return tensor


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=squash_cases | votes_cases | routing_cases | dense_cases,
    dtype=DTYPE,
    kinds=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(case: cases.Case, dtype: torch.dtype, kinds: list[int], seed: int) -> None:
    drawn = case.inputs(dtype, seed=seed, requires_grad=False)
    exact = [t.double().requires_grad_() for t in drawn]
    wanted = case.call(exact, "reference")
    wanted_gradients = gradients(wanted, exact)
    for backend in backends.BACKENDS:
        if backends.lacking(case.op, backend) is not None:
            continue
        device = device_of(backend)
        inputs = [layout(t.to(device), kind).requires_grad_() for t, kind in zip(drawn, kinds, strict=False)]
        result = case.call(inputs, backend)
        assert_near(result, wanted, 2 * RTOL[dtype], f"{backend} result")
        for got, want, name in zip(gradients(result, inputs), wanted_gradients, case.shapes, strict=True):
            scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
            assert_near(got / scale, want / scale, 20 * RTOL[dtype], f"{backend} gradient of {name}")

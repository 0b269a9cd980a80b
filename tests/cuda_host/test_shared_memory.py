"""What backend "cuda" tells of the shared memory of its blocks where there is no device to ask."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_host import host


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("parents", "columns"), [(10, 16), (64, 16), (10, 32), (100, 16)])
def test_dense_capsules_tells_what_its_plan_has(parents: int, columns: int, dtype: torch.dtype, raw_ops: None) -> None:
    ops = torch.ops.caps_kernels_cuda_host
    shapes = (4, 300, 8), (300, parents, 8, columns)
    with host.load("dense_capsules").settings(shared_limit=163 * 1024):  # of an A100
        plan = ops.dense_capsules_plan(*(torch.empty(shape, dtype=dtype) for shape in shapes), 1, 3)
    told = ops.dense_capsules_shared(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), 1)
    assert (told[0], told[2]) == (plan[7], plan[9])
    assert told[0] <= told[1] <= told[2]


def test_dynamic_routing_tells_what_its_arrays_take(raw_ops: None) -> None:
    host.load("dynamic_routing")
    shared = torch.ops.caps_kernels_cuda_host.dynamic_routing_shared
    votes = torch.empty(128, 1152, 10, 24, device="meta")
    # 32 lower capsules of a tile have a coefficient for each j, in backward two; four of 256 threads share each of 60
    # packs.
    assert shared(votes, 3) == (4 * (32 * 10 + 4 * 240), 4 * (2 * 32 * 10 + 4 * 240))
    # Where registers hold the votes, no shared memory is needed.
    assert shared(torch.empty(128, 1152, 10, 16, device="meta"), 3) == (0, 0)
    # Coefficients of 10,000 capsules do not fit: they lie in global memory.
    assert shared(torch.empty(1, 8, 10000, 16, device="meta"), 3) == (0, 0)

"""dense_capsules of backend "cuda" on the host: both sides of every tile, launches, and what its tests notice."""

from __future__ import annotations

import pytest
import torch

from caps_kernels.ops.dense_capsules import cuda
from tests.cases import Case, dense_capsules
from tests.cuda_host import host
from tests.cuda_host.test_ops import run
from tests.test_op_contract import RTOL, assert_near, wanted_of

TILES = (
    # Rows of the table of tiles (csrc/include/caps/gpu_dense_plan.h) by J and E: both sides of each limit.
    dense_capsules("J-10", 2, 2, 10, 8, 16, bias=True),
    dense_capsules("J-11", 2, 2, 11, 8, 16, leaky=True),
    dense_capsules("J-16", 2, 2, 16, 3, 16),
    dense_capsules("J-17", 2, 2, 17, 8, 16),
    dense_capsules("J-64", 1, 2, 64, 4, 9, iterations=2),
    dense_capsules("J-65", 1, 2, 65, 3, 5, iterations=2),
    dense_capsules("E-17", 2, 3, 3, 5, 17, bias=True),
    dense_capsules("E-32", 2, 2, 3, 8, 32),
    dense_capsules("E-33", 2, 2, 3, 8, 33, leaky=True, bias=True),
    dense_capsules("E-33-shared", 2, 4, 2, 9, 33, positions=2, bias=True, iterations=4),
    dense_capsules("E-33-last", 2, 2, 3, 8, 33, routing_grad="last"),
    # Samples: tiles of 8, 16 and 32.
    dense_capsules("B-9", 9, 3, 2, 8, 16),
    dense_capsules("B-17", 17, 3, 2, 8, 16, leaky=True),
    dense_capsules("B-33", 33, 3, 2, 8, 16, routing_grad="last", bias=True),
    dense_capsules("B-33-shared", 33, 4, 2, 7, 15, positions=2),
    # D of more than one step, and more of W than shared memory holds.
    dense_capsules("D-17", 2, 2, 2, 17, 16),
    dense_capsules("D-64", 1, 2, 59, 64, 16, iterations=1),
)
LONG = (
    # Chunks of more lower capsules than stages of shared memory, copied by 16 bytes or not; groups of as many matrices.
    dense_capsules("I-1330", 2, 1330, 1, 8, 8, iterations=2),
    dense_capsules("I-1330-shared", 2, 1330, 1, 1, 2, positions=1330, iterations=2),
)
RUNS = [(case, dtype) for case in TILES for dtype in RTOL]
RUNS += [(case, dtype) for case in LONG for dtype in (torch.float32, torch.bfloat16)]
ORDERS = host.orders({"order": 0, "processors": 3}, {"order": 2, "seed": 1, "processors": 1})


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_both_sides_of_every_tile(case: Case, dtype: torch.dtype, raw_ops: None) -> None:
    inputs = case.inputs(dtype, requires_grad=False)
    library = host.load("dense_capsules")
    found = []
    for order in ORDERS:
        with library.settings(**order):
            found.append(run(case, inputs))
    wanted, wanted_grads = wanted_of(case, inputs)
    assert_near(found[0][0], wanted, RTOL[dtype], "result")
    for name, got, want in zip(case.shapes, found[0][3:], wanted_grads, strict=False):
        assert_near(got, want, 4 * RTOL[dtype], f"gradient of {name}")
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("case", [case for case in TILES if case.name != "D-64"], ids=str)
def test_what_no_tile_holds_is_known_to_be_slow(case: Case, dtype: torch.dtype, raw_ops: None) -> None:
    u, weight = (torch.ones(case.shapes[name], dtype=dtype) for name in ("u", "weight"))
    host.load("dense_capsules")
    options = case.options.get("positions", 1), case.options.get("iterations", 3)
    plan = torch.ops.caps_kernels_cuda_host.dense_capsules_plan(u, weight, *options)
    assert (cuda.slow(u, weight) is not None) == (plan[2] == 0)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("positions", [1, 2])
def test_launches(iterations: int, positions: int, raw_ops: None) -> None:
    """One for forward and two for backward; the same bits where there are no cooperative launches."""
    case = dense_capsules("launches", 2, 4, 2, 3, 4, positions=positions, bias=True, iterations=iterations)
    inputs = case.inputs(torch.float32, requires_grad=False)
    library = host.load("dense_capsules")
    library.launches()
    together = run(case, inputs)
    assert library.launches() == 1 + 2
    with library.settings(cooperative=0):
        apart = run(case, inputs)
        assert library.launches() == 2 * iterations + 2 * iterations + (positions > 1)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)

"""The harness itself: what it runs comes out right, its stand-ins are as the PTX manual says, and it sees mistakes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tests.cuda_host import host

PROBE = Path(__file__).with_name("probe.cu")


def call(name: str, *args: object, library: Path | None = None) -> int:
    """A function of the probe, arrays passed by their address."""
    function = getattr(ctypes.CDLL(str(library or host.build(PROBE))), f"probe_{name}")
    return int(function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in args)))


@pytest.fixture(autouse=True)
def compiler() -> None:
    if not host.can_compile():
        pytest.skip("no g++ to compile the kernels for the host")


@pytest.mark.parametrize("order", host.ORDERS)
def test_barriers_and_shared_memory(order: str) -> None:
    values, out = np.arange(4 * 64, dtype=np.float32), np.empty(4 * 64, np.float32)
    with host.Host(host.build(PROBE)).settings(order=host.ORDERS[order]):
        assert call("reverse", values, out, 4, 64) == 0
    np.testing.assert_array_equal(out.reshape(4, 64), values.reshape(4, 64)[:, ::-1])


@pytest.mark.parametrize("order", host.ORDERS)
def test_shuffles_and_the_grid_barrier(order: str) -> None:
    values, out = np.arange(5 * 32, dtype=np.float32), np.empty(6, np.float32)
    with host.Host(host.build(PROBE)).settings(order=host.ORDERS[order]):
        assert call("sum", values, out, 5, 1) == 0
    assert out[0] == values.sum()


def test_a_cooperative_launch_must_fit() -> None:
    values, out = np.zeros(7 * 32, np.float32), np.empty(8, np.float32)
    assert call("sum", values, out, 7, 1) == 720


@pytest.mark.parametrize("size", [0, 4, 100, 256])
def test_asynchronous_copies(size: int) -> None:
    values = np.arange(256, dtype=np.float32)
    out = np.full(256, -1, np.float32)
    assert call("copy", values, out, size) == 0
    np.testing.assert_array_equal(out, np.where(np.arange(256) < size, values, 0))


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Of integers small enough to be exact."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint32)


def test_fragments_of_a_product_are_those_of_the_ptx_manual() -> None:
    # PTX ISA, "Matrix Fragments for mma.m16n8k8", .bf16: row and column of each element of each lane.
    lanes, element = np.arange(32)[:, None], np.arange(4)
    group, in_group = lanes >> 2, lanes % 4
    a_row, a_column = np.where(element < 2, group, group + 8), in_group * 2 + (element & 1)
    b_row, b_column = in_group * 2 + element[:2], np.broadcast_to(group, (32, 2))
    c_row, c_column = np.where(element < 2, group, group + 8), in_group * 2 + (element & 1)
    draw = np.random.default_rng(0)
    a, b = draw.integers(-8, 9, (16, 8)), draw.integers(-8, 9, (8, 8))
    a_bits, b_bits = bfloat16_bits(a)[a_row, a_column], bfloat16_bits(b)[b_row, b_column]
    registers_a = np.ascontiguousarray(a_bits[:, 0::2] | a_bits[:, 1::2] << 16)
    registers_b = np.ascontiguousarray(b_bits[:, 0] | b_bits[:, 1] << 16)
    c = np.empty((32, 4), np.float32)
    assert call("product", registers_a, registers_b, c) == 0
    np.testing.assert_array_equal(c, (a @ b)[c_row, c_column])


def test_a_transposed_load_is_that_of_the_ptx_manual() -> None:
    # PTX ISA, "ldmatrix": lane l holds elements 2 (l % 4) and that + 1 of row l / 4 of each matrix, transposed here.
    matrices = np.arange(128, dtype=np.uint16).reshape(2, 8, 8)
    out = np.empty((32, 2), np.uint32)
    assert call("transpose", matrices, out) == 0
    lanes = np.arange(32)
    for n in range(2):
        turned = matrices[n].T.astype(np.uint32)
        wanted = turned[lanes // 4, 2 * (lanes % 4)] | turned[lanes // 4, 2 * (lanes % 4) + 1] << 16
        np.testing.assert_array_equal(out[:, n], wanted)


SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from tests.cuda_host import host
from tests.cuda_host.test_harness import call
library = Path(sys.argv[1])
results = []
for order in host.ORDERS.values():
    values, out = np.arange(1, 161, dtype=np.float32) / 7, np.zeros(160, np.float32)
    with host.Host(library).settings(order=order, seed=1):
        call(sys.argv[2], values, out, *map(int, sys.argv[3:]), library=library)
    results.append(out)
sys.exit(0 if all(np.array_equal(results[0], other) for other in results) else "the order of threads shows")
"""
REVERSE, SUM = ("reverse", "5", "32"), ("sum", "5", "1")
MISTAKES = {
    "a removed barrier": (REVERSE, "thread", "  __syncthreads();\n  dynamic", "  dynamic", "data race"),
    "a removed barrier, by the order": (REVERSE, "", "  __syncthreads();\n  dynamic", "  dynamic", "order of threads"),
    "a removed grid barrier": (SUM, "thread", "  grid_barrier();\n", "", "data race"),
    "an index off by one": (REVERSE, "address", "dynamic[(i + 1) % n]", "dynamic[i + 1]", "heap-buffer-overflow"),
    "a result off by one": (SUM, "address", "args.in[blockIdx.x * 32 +", "args.in[160 + blockIdx.x * 32 +", "overflow"),
    "a sum in the order of arrival": (
        SUM,
        "",
        "  if (threadIdx.x == 0) args.out[1 + blockIdx.x] = total;",
        "  args.out[1] += total * float(threadIdx.x + 1);",
        "order of threads",
    ),
    "a barrier not reached by all": (
        REVERSE,
        "",
        "  __syncthreads();\n  dynamic",
        "  if (i) __syncthreads();\n  dynamic",
        "never",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_mistakes_are_seen(name: str | None, tmp_path: Path) -> None:
    arguments, sanitizer, before, after, wanted = MISTAKES[name] if name else (REVERSE, "", "", "", "")
    text = PROBE.read_text(encoding="utf-8")
    assert before in text
    changed = tmp_path / "probe.cu"
    changed.write_text(text.replace(before, after, 1) if name else text, encoding="utf-8")
    done = host.run_sanitized(sanitizer, ["-c", SCRIPT, str(host.build(changed, sanitizer)), *arguments])
    assert (done.returncode == 0) == (name is None), done.stderr
    assert wanted in done.stderr

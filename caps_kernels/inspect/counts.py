"""Launches and bytes of a call: counted while Triton's interpreter runs it, by the formulas of the ops, and of eager
PyTorch. Bytes are logical: every element that a kernel loads or stores counts, also where a cache will have it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from caps_kernels._triton import Count, Sample, recording
from caps_kernels.inspect.calls import arguments, calls

GPUS = {
    "A100": (2.039e12, 19.5e12, 312e12),
    "H100": (3.35e12, 67e12, 989e12),
    "B200": (8.0e12, 75e12, 2250e12),
}
"""Of the SXM modules, by NVIDIA's datasheets: bytes a second of memory, FLOP a second in float32 and in bfloat16 on the
matrix units, without sparsity."""


def formulas(op: str, sample: Sample, dtype: torch.dtype) -> tuple[Count, Count]:
    """What an op's formulas say of a sample's forward and backward."""
    args = arguments(op, sample, dtype, "meta")
    counts: tuple[Count, Count] = importlib.import_module(f"caps_kernels.ops.{op}.triton").counts(*args)
    return counts


def interpreted(op: str, sample: Sample, dtype: torch.dtype) -> tuple[Count, Count]:
    """What Triton's interpreter does in a sample's forward and backward, FLOP not counted."""
    forward, backward = calls(op, sample, dtype, "cpu", "triton")
    results, first = _interpreted(forward)
    grad = torch.ones_like(results[0])
    _, second = _interpreted(lambda: backward(grad, results))
    return first, second


def _interpreted(call: Callable[[], Any]) -> tuple[Any, Count]:
    with _memory() as bytes_, recording() as launches, Operators() as operators:
        results = call()
    launched = len(launches) + operators.count
    return results, Count(launched, bytes_["read"] + operators.read, bytes_["written"] + operators.written, 0)


@contextmanager
def _memory() -> Iterator[dict[str, int]]:
    """Count the bytes that interpreted kernels load and store in a block."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    found = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    execute = GridExecutor.__call__

    def size(pointers: Any, mask: Any) -> int:
        bits: int = pointers.get_element_ty().primitive_bitwidth
        return int(mask.data.sum()) * (bits // 8)

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        found["read"] += size(pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        found["written"] += size(pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    def uncounted(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # The interpreter's own operators on tensors are none of the call's.
            execute(self, *args, **kwargs)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    GridExecutor.__call__ = uncounted
    try:
        yield found
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__ = execute


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators in a block, views and allocations excluded, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.name() or func.name() == "aten::detach"):
            self.count += 1
            if func.name() != "aten::fill_.Scalar":
                self.read += sum(_bytes(leaf) for leaf in tree_leaves((args, kwargs)))
            self.written += sum(_bytes(leaf) for leaf in tree_leaves(result))
        return result


def _bytes(leaf: Any) -> int:
    """Bytes of the elements a tensor has in memory: expanded ones count once."""
    if not isinstance(leaf, Tensor):
        return 0
    stored: int = 1
    for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
        stored *= size if stride != 0 else min(size, 1)
    return stored * leaf.element_size()


def eager(op: str, sample: Sample, dtype: torch.dtype) -> tuple[Count, Count]:
    """What the reference does in eager PyTorch, on tensors without memory; FLOP not counted."""
    forward, backward = calls(op, sample, dtype, "meta", "reference")
    with Operators() as first:
        results = forward()
    grad = torch.ones_like(results[0])
    with Operators() as second:
        backward(grad, results)
    return Count(first.count, first.read, first.written, 0), Count(second.count, second.read, second.written, 0)


def seconds(count: Count, dtype: torch.dtype, gpu: str) -> float:
    """The least time a GPU takes: that of the bytes, if all go to memory, or of the FLOP at its peak."""
    bandwidth, single, half = GPUS[gpu]
    peak = half if dtype in (torch.float16, torch.bfloat16) else single
    return max(count.bytes / bandwidth, count.flop / peak)

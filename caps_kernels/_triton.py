"""What Triton kernels share: how they are launched, in which precision they compute, and what is compiled of them.

Rules of every kernel here:

- Grids have one dimension, which may be as large as 2³¹ - 1 (the others end at 65,535), and positions in memory are
  computed in 64 bits: `program(0)` gives the program's number so.
- Numbers are loaded with `load`, which converts them to the dtype of their sums at once (Triton's interpreter computes
  wrongly with bfloat16 as it is), and stored with `store`, which rounds.
- `product` multiplies matrices. Its operands have the dtype of memory (`operand`), its result that of sums.
- Tiles have sizes that are powers of two, of which a mask leaves the part that is there.
- Sums go over tiles in an order that the shapes alone decide, without atomic operations on floats.

All launches go through `launch`, where `recording` counts them, or collects them without running any, so that what is
counted and what is compiled ahead of time is what a call does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import astuple, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from caps_kernels.backends import TRITON_INTERPRETS
from caps_kernels.ops.precision import accumulation_dtype

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

LEAST_DEPTH = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16
"""How deep a `tl.dot` of 32-bit numbers must be: as one matrix instruction of NVIDIA's, or before Triton 3.8 as two."""


@dataclass(frozen=True)
class Sample:
    """A call that `python -m caps_kernels.inspect` compiles for and counts: an op names one for each of its tilings."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    """The tensors' shapes, by the names of the public function's arguments."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """What a call does: an op's `counts(*args)` gives one for its forward and one for its backward."""

    launches: int
    read: int
    """Bytes that kernels load, whether or not a cache has them."""
    written: int
    """Bytes that kernels store."""
    flop: int

    @property
    def bytes(self) -> int:
        """Bytes loaded and stored."""
        return self.read + self.written


def sum_counts(counts: Iterable[Count]) -> Count:
    """Of one after the other."""
    each = [astuple(count) for count in counts]
    return Count(*map(sum, zip(*each, strict=True)))


@dataclass(frozen=True)
class Launch:
    """A kernel and how it was started."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    """The kernel's compile-time arguments: sizes of tiles and what a variant leaves out."""
    warps: int
    stages: int
    registers: int | None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.kernel.__name__
        return name


@dataclass(frozen=True)
class _Record:
    launches: list[Launch]
    architecture: str | None


_RECORD: ContextVar[_Record | None] = ContextVar("caps_kernels_record", default=None)
_NOTHING = nullcontext()


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    warps: int = 4,
    stages: int = 1,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Start `programs` programs of a kernel on its first tensor's device.

    Args:
        kernel: a `triton.jit` function.
        programs: how many; none start nothing.
        *args: its tensors and integers.
        warps: how many warps share a program.
        stages: how many iterations of a loop the compiler may load ahead.
        registers: how many a thread may take on NVIDIA GPUs; the compiler decides by default.
        **constants: its compile-time arguments.
    """
    if programs == 0:
        return
    tensor = next(a for a in args if isinstance(a, Tensor))
    limit = registers if architecture(tensor).startswith("sm_") else None
    launched = Launch(kernel, programs, args, constants, warps, stages, limit)
    record = _RECORD.get()
    if record is not None:
        record.launches.append(launched)
        if record.architecture is not None:
            return
    with _around(tensor):
        kernel[(programs,)](*args, **constants, **launched.options)


def _around(tensor: Tensor) -> AbstractContextManager[object]:
    """What a launch on a tensor needs around it: its device, where another one is current, which takes a while."""
    if TRITON_INTERPRETS:
        return _without_warnings()
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Make inf and NaN without a word in the interpreter's NumPy, as a GPU does."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@contextmanager
def recording(architecture: str | None = None) -> Iterator[list[Launch]]:
    """Collect the launches of a block. With an architecture ("sm_90", "gfx942") collect what would be launched there
    and run nothing: the block's tensors may be on "meta".
    """
    record = _Record([], architecture)
    token = _RECORD.set(record)
    try:
        yield record.launches
    finally:
        _RECORD.reset(token)


def architecture(tensor: Tensor) -> str:
    """For whom kernels on a tensor are compiled: "sm_90", "gfx942" or "interpreter"."""
    record = _RECORD.get()
    if record is not None and record.architecture is not None:
        return record.architecture
    return _architecture(tensor.device.index) if tensor.is_cuda else "interpreter"


@cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The Triton type in which kernels compute on tensors of a dtype."""
    return TYPES[accumulation_dtype(dtype)]


def operand(dtype: torch.dtype) -> tl.dtype:
    """The Triton type of `product`'s operands on tensors of a dtype: their own, whose products float32 holds, except in
    the interpreter, which multiplies bfloat16 wrongly.
    """
    return accumulator(dtype) if TRITON_INTERPRETS else TYPES[dtype]


def dot_precision(tensor: Tensor) -> str:
    """How `tl.dot` multiplies float32: "ieee", as exactly as float32 goes, or "tf32" where the user has allowed it.

    It follows PyTorch's own setting, `torch.backends.cuda.matmul.fp32_precision`, of which
    `torch.set_float32_matmul_precision` ("high", "medium") and `torch.backends.cuda.matmul.allow_tf32` are older names;
    PyTorch's default is exact. AMD GPUs always compute exactly. Other dtypes are not concerned.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and architecture(tensor).startswith("sm_") else "ieee"


def padded(size: int, least: int = 1) -> int:
    """The power of two that holds `size`, and not less than `least`."""
    return max(least, 1 << (size - 1).bit_length())


def cdiv(count: int, size: int) -> int:
    """How many pieces of a size cover a count. `triton.cdiv` does the same in ten times the time."""
    return -(-count // size)


def strides(tensor: Tensor, dims: Sequence[int]) -> tuple[int, ...]:
    """A tensor's strides along some dimensions; 0 along those of size 1, whose strides mean nothing."""
    sizes, steps = tensor.shape, tensor.stride()
    return tuple(steps[d] if sizes[d] != 1 else 0 for d in dims)


@triton.jit
def program():
    """This program's number, in 64 bits."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def load(pointers, mask, TYPE: tl.constexpr):
    """Numbers from memory in the type in which they are computed with; 0 where the mask is false."""
    return tl.load(pointers, mask=mask, other=0.0).to(TYPE)


@triton.jit
def store(pointers, values, mask):
    """Round numbers to the type of memory and write those that the mask admits."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b: by `tl.dot`, or for float64, which not every GPU multiplies so, as sums of products, for small tiles."""
    if a.dtype == tl.float64:
        result = tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        result = tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)
    return result


@triton.jit
def _sum_parts(
    parts, result, count, size, PARTS: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """result [size] = Σ of parts [count, size]."""
    part = tl.arange(0, PARTS).to(tl.int64)[:, None]
    n = program() * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((PARTS, TILE), TYPE)
    for start in range(0, count, PARTS):
        mask = (start + part < count) & (n < size)
        total += load(parts + (start + part) * size + n, mask, TYPE)
    store(result + n, tl.expand_dims(tl.sum(total, 0), 0), n < size)


def sum_parts(parts: Tensor, result: Tensor) -> None:
    """Write the sum of contiguous parts [count, …] to a contiguous result […], in an order that count decides."""
    size, count = result.numel(), parts.shape[0]
    together = min(padded(max(count, 1)), 128)
    width = 2048 // together
    launch(
        _sum_parts,
        cdiv(size, width),
        parts,
        result,
        count,
        size,
        PARTS=together,
        TILE=width,
        TYPE=accumulator(result.dtype),
    )

"""squash on backend "triton". reference.py has the mathematics, README.md the counts.

Vectors of up to `WHOLE` elements are read once, as rows of a tile. Longer ones are read in parts, twice: once for their
length (and, backward, for their product with the gradient), once for the result.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from caps_kernels._triton import Count, Sample, accumulator, cdiv, launch, load, padded, program, store, strides
from caps_kernels.backends import Implementation

TILE = 2048
"""Elements of a tile of whole vectors (float64: half): 16 for each thread of 4 warps, four 128-bit loads of float32."""
WHOLE = 4096
"""Longer vectors are read in parts of so many elements."""

SAMPLES = (
    Sample("primary capsules", {"s": (128, 1152, 8)}),
    Sample("total inputs", {"s": (128, 10, 16)}),
    Sample("odd", {"s": (64, 100, 21)}),
    Sample("along channels", {"s": (32, 16, 400)}, {"dim": 1}),
    Sample("long", {"s": (8, 20_000)}),
)
COUNTED = (Sample("rows", {"s": (300, 8)}), Sample("in parts", {"s": (2, 9001)}))
"""For which the formulas of `counts` are compared with a run in the interpreter."""


@triton.jit
def squash_of(s, axis: tl.constexpr):
    """v of vectors along one axis of a tile, padded with zeros; any other element may be NaN."""
    direction, q, inside = polar(s, axis)
    return direction * (tl.where(inside, q * q, 1.0) / (1.0 + q * q))


@triton.jit
def squash_gradient(grad_v, s, axis: tl.constexpr):
    """grad_s of vectors along one axis of a tile, padded with zeros."""
    direction, q, inside = polar(s, axis)
    radial = tl.expand_dims(tl.sum(direction * grad_v, axis), axis)
    across, along = slopes(q, inside)
    return across * grad_v + along * radial * direction


@triton.jit
def polar(s, axis: tl.constexpr):
    """The direction s / |s|, and with a size of 1 along the axis q = min(|s|, 1 / |s|) and whether |s| ≤ 1."""
    scale = tl.expand_dims(tl.max(tl.abs(s), axis), axis)
    scaled = s / tl.where(scale > 0, scale, 1.0)
    norm = norm_of(tl.expand_dims(tl.sum(scaled * scaled, axis), axis))
    q, inside = fold(scale * norm)
    return scaled / norm, q, inside


@triton.jit
def norm_of(square):
    """The root of a sum of squares, and 1 in place of 0; NaN stays, which the largest element does not tell of."""
    return tl.sqrt(tl.where(square == 0, 1.0, square))


@triton.jit
def fold(length):
    """q = min(|s|, 1 / |s|) and whether |s| ≤ 1."""
    inside = length <= 1
    return tl.where(inside, length, 1.0 / tl.where(inside, 1.0, length)), inside


@triton.jit
def slopes(q, inside):
    """|v| / r, and r times its derivative."""
    across = q / (1.0 + q * q)
    along = across * (1.0 - q * q) / (1.0 + q * q)
    return across, tl.where(inside, along, -along)


@triton.jit
def _positions(row, e, INNER: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr):
    """Where elements of vectors lie: row r has the outer index r // INNER and the inner one r % INNER."""
    return (row // INNER * S0 + row % INNER * S2)[:, None] + e[None, :] * S1


@triton.jit
def forward_whole(
    s, v, rows,
    E: tl.constexpr, INNER: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """v [outer, E, INNER], contiguous, from s of strides (S0, S1, S2): ROWS vectors a program."""
    row = program() * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (e < E)[None, :]
    tile = load(s + _positions(row, e, INNER, S0, S1, S2), mask, TYPE)
    store(v + _positions(row, e, INNER, E * INNER, INNER, 1), squash_of(tile, 1), mask)


@triton.jit
def backward_whole(
    grad_v, s, grad_s, rows,
    E: tl.constexpr, INNER: tl.constexpr,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """grad_s [outer, E, INNER], contiguous, from grad_v and s of strides (G0, G1, G2) and (S0, S1, S2)."""
    row = program() * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (e < E)[None, :]
    tile = load(s + _positions(row, e, INNER, S0, S1, S2), mask, TYPE)
    grad = load(grad_v + _positions(row, e, INNER, G0, G1, G2), mask, TYPE)
    store(grad_s + _positions(row, e, INNER, E * INNER, INNER, 1), squash_gradient(grad, tile, 1), mask)


@triton.jit
def forward_in_parts(
    s, v,
    E: tl.constexpr, INNER: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    WIDTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """v as `forward_whole`, one vector a program."""
    row = program()
    s += row // INNER * S0 + row % INNER * S2
    v += row // INNER * (E * INNER) + row % INNER
    e = tl.arange(0, WIDTH).to(tl.int64)
    scale = tl.zeros((), TYPE)
    square = tl.zeros((), TYPE)
    for start in range(0, E, WIDTH):
        part = load(s + (start + e) * S1, start + e < E, TYPE)
        scale, square = _with_part(scale, square, part)
    unit = tl.where(scale > 0, scale, 1.0)
    norm = norm_of(square)
    q, inside = fold(scale * norm)
    length = tl.where(inside, q * q, 1.0) / (1.0 + q * q)
    for start in range(0, E, WIDTH):
        part = load(s + (start + e) * S1, start + e < E, TYPE)
        store(v + (start + e) * INNER, part / unit / norm * length, start + e < E)


@triton.jit
def _with_part(scale, square, part):
    """The largest |s_e| so far, and the sum of squares in units of it, with one part more."""
    larger = tl.maximum(scale, tl.max(tl.abs(part), 0))
    unit = tl.where(larger > 0, larger, 1.0)
    shrink = scale / unit
    scaled = part / unit
    return larger, square * shrink * shrink + tl.sum(scaled * scaled, 0)


@triton.jit
def backward_in_parts(
    grad_v, s, grad_s,
    E: tl.constexpr, INNER: tl.constexpr,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    WIDTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """grad_s as `backward_whole`, one vector a program."""
    row = program()
    s += row // INNER * S0 + row % INNER * S2
    grad_v += row // INNER * G0 + row % INNER * G2
    grad_s += row // INNER * (E * INNER) + row % INNER
    e = tl.arange(0, WIDTH).to(tl.int64)
    scale = tl.zeros((), TYPE)
    square = tl.zeros((), TYPE)
    product = tl.zeros((), TYPE)
    for start in range(0, E, WIDTH):
        part = load(s + (start + e) * S1, start + e < E, TYPE)
        grad = load(grad_v + (start + e) * G1, start + e < E, TYPE)
        before = scale
        scale, square = _with_part(scale, square, part)
        unit = tl.where(scale > 0, scale, 1.0)
        product = product * (before / unit) + tl.sum(part / unit * grad, 0)
    unit = tl.where(scale > 0, scale, 1.0)
    norm = norm_of(square)
    q, inside = fold(scale * norm)
    across, along = slopes(q, inside)
    radial = product / norm
    for start in range(0, E, WIDTH):
        part = load(s + (start + e) * S1, start + e < E, TYPE)
        grad = load(grad_v + (start + e) * G1, start + e < E, TYPE)
        result = across * grad + along * radial * (part / unit / norm)
        store(grad_s + (start + e) * INNER, result, start + e < E)


def forward(s: Tensor, dim: int) -> tuple[Tensor]:
    """v [...] from s [...]; lengths are taken along `dim`."""
    view = _three_dimensions(s, dim)  # [outer, E, inner]
    v = torch.empty_like(s, memory_format=torch.contiguous_format)
    _launch(view, (), v)
    return (v,)


def backward(grad_v: Tensor, s: Tensor, dim: int) -> tuple[Tensor]:
    """grad_s [...] from grad_v [...] and s [...]."""
    grad_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    _launch(_three_dimensions(s, dim), (_three_dimensions(grad_v, dim),), grad_s)
    return (grad_s,)


def _three_dimensions(tensor: Tensor, dim: int) -> Tensor:
    """The tensor as [outer, E, inner], around `dim`; without a copy wherever strides allow it."""
    dim %= tensor.dim()
    sizes = tensor.shape
    return tensor.reshape(prod(sizes[:dim]), sizes[dim], prod(sizes[dim + 1 :]))


def _launch(s: Tensor, grad: tuple[Tensor, ...], result: Tensor) -> None:
    """Run forward, or backward where there is a gradient, on tensors [outer, E, inner]."""
    outer, size, inner = s.shape
    layout = dict(zip(("S0", "S1", "S2"), strides(s, range(3)), strict=True))
    if grad:
        layout.update(zip(("G0", "G1", "G2"), strides(grad[0], range(3)), strict=True))
    rows = outer * inner
    common = {"E": size, "INNER": inner, **layout, "TYPE": accumulator(s.dtype)}
    if size > WHOLE:
        kernel = backward_in_parts if grad else forward_in_parts
        launch(kernel, rows, *grad, s, result, warps=8, **common, WIDTH=WHOLE)
        return
    width = padded(size)
    height = max(1, TILE // width // (2 if s.dtype == torch.float64 else 1))
    kernel = backward_whole if grad else forward_whole
    warps = 8 if width > TILE else 4
    launch(kernel, cdiv(rows, height), *grad, s, result, rows, warps=warps, **common, ROWS=height, WIDTH=width)


def counts(s: Tensor, dim: int) -> tuple[Count, Count]:
    """Of forward and backward; FLOP without roots and divisions."""
    size = s.numel() * s.element_size()
    times = 2 if s.shape[dim] > WHOLE else 1
    return Count(1, times * size, size, 6 * s.numel()), Count(1, 2 * times * size, size, 11 * s.numel())


def regime(s: Tensor, dim: int) -> str:
    """Which of its kernels would run."""
    return "vectors read in parts, twice" if s.shape[dim] > WHOLE else "whole vectors in tiles"


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

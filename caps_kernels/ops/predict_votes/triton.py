"""predict_votes on backend "triton": one product of matrices for each W_t [D, J·E], with the B·P lower capsules that
share it.

Forward gives a program some of these capsules (rows) and some of the J·E columns. Backward gives it rows and all
columns, so that the votes' gradient is read once: it ends with their grad_u, and writes what its rows add to
grad_weight; where the rows of a type need several programs, these parts are summed at the end. README.md has the
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from caps_kernels._triton import (
    Count,
    Sample,
    accumulator,
    cdiv,
    dot_precision,
    launch,
    load,
    operand,
    padded,
    product,
    program,
    store,
    strides,
    sum_parts,
)
from caps_kernels.backends import Implementation
from caps_kernels.ops.precision import accumulation_dtype

SAMPLES = (
    Sample("28x28, 10 classes", {"u": (128, 1152, 8), "weight": (1152, 10, 8, 16)}),
    Sample("one sample", {"u": (1, 1152, 8), "weight": (1152, 10, 8, 16)}),
    Sample("few samples", {"u": (16, 1152, 8), "weight": (1152, 59, 8, 16)}),
    Sample("shared", {"u": (16, 32 * 36, 8), "weight": (32, 10, 8, 16)}, {"positions": 36}),
    Sample("wide", {"u": (32, 288, 64), "weight": (288, 32, 64, 64)}),
    Sample("odd", {"u": (40, 100, 5), "weight": (100, 7, 5, 11)}),
)
COUNTED = (
    Sample("tiles", {"u": (70, 3, 8), "weight": (3, 10, 8, 16)}),
    Sample("several parts", {"u": (3, 260, 5), "weight": (2, 2, 5, 3)}, {"positions": 130}),
    Sample("deep", {"u": (5, 2, 67), "weight": (2, 2, 67, 3)}),
)
"""For which the formulas of `counts` are compared with a run in the interpreter."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles; README.md says why these."""

    rows: int
    columns: int
    depth: int
    """Dimensions D of a lower capsule at a time."""
    warps: int = 4


def forward_tiles(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward for B·P rows, J·E columns and D = depth."""
    if dtype == torch.float64:
        return Tiles(min(padded(rows), 16), min(padded(columns), 32), min(padded(depth), 4))
    few = rows <= 16
    return Tiles(16 if few else 64, min(padded(columns, 16), 128 if few else 64), min(padded(depth, 16), 32))


def backward_tiles(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the backward."""
    if dtype == torch.float64:
        return Tiles(min(padded(rows), 16), min(padded(columns), 16), min(padded(depth), 8))
    depth = min(padded(depth, 16), 64)
    if rows <= 16:
        return Tiles(16, min(padded(columns, 16), 64), depth)
    if dtype == torch.float32:  # Multiplied without matrix units, from registers, of which fewer warps would spill.
        return Tiles(min(padded(rows), 64), 16, depth, warps=8)
    return Tiles(min(padded(rows), 128), min(padded(columns, 16), 32), depth)


@triton.jit
def _rows(m, type_, P: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr):
    """Where lower capsules of a type lie in a tensor [B, I, …]: row m is of sample m // P at position m % P."""
    return m // P * S0 + (type_ * P + m % P) * S1


@triton.jit
def _weights(type_, n, d, J: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    """Where W_t has column n = j·E + e of dimension d, by broadcasting n against d."""
    return type_ * (J * D * E) + n // E * (D * E) + d * E + n % E


@triton.jit
def forward_kernel(
    u, weight, votes, rows, row_tiles,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, V0: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """votes [B, I, J, E], whose stride of b is V0, from u [B, I, D] of strides (U0, U1, U2) and weight [T, J, D, E]."""
    column_tiles: tl.constexpr = (J * E + COLUMNS - 1) // COLUMNS
    number = program()
    m = number % row_tiles * ROWS + tl.arange(0, ROWS)
    n = number // row_tiles % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    type_ = number // row_tiles // column_tiles
    tile = tl.zeros((ROWS, COLUMNS), TYPE)
    for start in tl.static_range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        left = load(
            u + _rows(m, type_, P, U0, U1)[:, None] + d[None, :] * U2, (m < rows)[:, None] & (d < D)[None, :], OPERAND
        )
        right = load(
            weight + _weights(type_, n[None, :], d[:, None], J, D, E), (n < J * E)[None, :] & (d < D)[:, None], OPERAND
        )
        tile += product(left, right, PRECISION)
    to = _rows(m, type_, P, V0, J * E)[:, None] + n[None, :]
    store(votes + to, tile, (m < rows)[:, None] & (n < J * E)[None, :])


@triton.jit
def backward_kernel(
    grad_votes, u, weight, grad_u, grad_weight, rows, row_tiles, types, columns,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, G3: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, GU0: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_u [B, I, D], whose stride of b is GU0, and the rows' part of grad_weight [row_tiles, T, J, D, E], from
    grad_votes [B, I, J, E] of strides (G0, G1, G2, G3), u of strides (U0, U1, U2) and weight [T, J, D, E].
    """
    depth_tiles: tl.constexpr = (D + DEPTH - 1) // DEPTH
    number = program()
    d = number % depth_tiles * DEPTH + tl.arange(0, DEPTH)
    part = number // depth_tiles % row_tiles
    m = part * ROWS + tl.arange(0, ROWS)
    type_ = number // depth_tiles // row_tiles
    inside = (m < rows)[:, None] & (d < D)[None, :]
    inputs = load(u + _rows(m, type_, P, U0, U1)[:, None] + d[None, :] * U2, inside, OPERAND)
    total = tl.zeros((ROWS, DEPTH), TYPE)
    for start in range(0, columns, COLUMNS):  # Not J * E, which the compiler knows, and would unroll the loop for.
        n = start + tl.arange(0, COLUMNS)
        at = _rows(m, type_, P, G0, G1)[:, None] + (n // E * G2 + n % E * G3)[None, :]
        grad = load(grad_votes + at, (m < rows)[:, None] & (n < J * E)[None, :], OPERAND)
        of_weight = _weights(type_, n[None, :], d[:, None], J, D, E)
        mask = (n < J * E)[None, :] & (d < D)[:, None]
        total += product(grad, tl.trans(load(weight + of_weight, mask, OPERAND)), PRECISION)
        store(grad_weight + part * types * (J * D * E) + of_weight, product(tl.trans(inputs), grad, PRECISION), mask)
    store(grad_u + _rows(m, type_, P, GU0, D)[:, None] + d[None, :], total, inside)


def forward(u: Tensor, weight: Tensor, positions: int) -> tuple[Tensor]:
    """votes [B, I, J, E] from u [B, I, D] and weight [T, J, D, E]."""
    batch, in_capsules, depth = u.shape
    types, out_capsules, _, out_dim = weight.shape
    votes = u.new_empty((batch, in_capsules, out_capsules, out_dim))
    rows, columns = batch * positions, out_capsules * out_dim
    tiles = forward_tiles(rows, columns, depth, u.dtype)
    row_tiles = cdiv(rows, tiles.rows)
    launch(
        forward_kernel,
        types * row_tiles * cdiv(columns, tiles.columns),
        u, weight.contiguous(), votes, rows, row_tiles,
        **_sizes(u, weight, positions, tiles), V0=in_capsules * columns,
    )  # fmt: skip
    return (votes,)


def backward(grad_votes: Tensor, u: Tensor, weight: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """grad_u [B, I, D] and grad_weight [T, J, D, E] from grad_votes [B, I, J, E]."""
    batch, in_capsules, depth = u.shape
    types, out_capsules, _, out_dim = weight.shape
    grad_u, grad_weight = u.new_empty(u.shape), weight.new_empty(weight.shape)
    rows = batch * positions
    tiles = backward_tiles(rows, out_capsules * out_dim, depth, u.dtype)
    row_tiles = cdiv(rows, tiles.rows)
    parts = grad_weight
    if row_tiles != 1:
        parts = weight.new_empty((row_tiles, *weight.shape), dtype=accumulation_dtype(weight.dtype))
    launch(
        backward_kernel,
        types * row_tiles * cdiv(depth, tiles.depth),
        grad_votes, u, weight.contiguous(), grad_u, parts, rows, row_tiles, types, out_capsules * out_dim,
        **_sizes(u, weight, positions, tiles), GU0=in_capsules * depth, warps=tiles.warps,
        **dict(zip(("G0", "G1", "G2", "G3"), strides(grad_votes, range(4)), strict=True)),
    )  # fmt: skip
    if row_tiles != 1:
        sum_parts(parts, grad_weight)
    return grad_u, grad_weight


def _sizes(u: Tensor, weight: Tensor, positions: int, tiles: Tiles) -> dict[str, Any]:
    """The compile-time arguments both kernels take."""
    _, out_capsules, depth, out_dim = weight.shape
    layout = dict(zip(("U0", "U1", "U2"), strides(u, range(3)), strict=True))
    sizes = {"J": out_capsules, "D": depth, "E": out_dim, "P": positions}
    tile = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
    numbers = {"TYPE": accumulator(u.dtype), "OPERAND": operand(u.dtype), "PRECISION": dot_precision(u)}
    return {**layout, **sizes, **tile, **numbers}


def counts(u: Tensor, weight: Tensor, positions: int) -> tuple[Count, Count]:
    """Of forward and backward."""
    columns, depth, rows = weight.shape[1] * weight.shape[3], u.shape[2], u.shape[0] * positions
    item, wide = u.element_size(), accumulation_dtype(u.dtype).itemsize
    votes = u.shape[0] * u.shape[1] * columns
    tiles = forward_tiles(rows, columns, depth, u.dtype)
    read = u.numel() * cdiv(columns, tiles.columns) + weight.numel() * cdiv(rows, tiles.rows)
    forward_count = Count(1, read * item, votes * item, 2 * votes * depth)
    tiles = backward_tiles(rows, columns, depth, u.dtype)
    parts = cdiv(rows, tiles.rows)
    read = votes * cdiv(depth, tiles.depth) + u.numel() + weight.numel() * parts
    summed = weight.numel() * parts * wide if parts > 1 else 0
    written = (u.numel() + weight.numel()) * item + summed
    return forward_count, Count(1 + (parts > 1), read * item + summed, written, 4 * votes * depth)


def regime(u: Tensor, weight: Tensor, positions: int) -> str:
    """The tiles of the forward."""
    columns = weight.shape[1] * weight.shape[3]
    tiles = forward_tiles(u.shape[0] * positions, columns, u.shape[2], u.dtype)
    return f"tiles of {tiles.rows} lower capsules by {tiles.columns} elements of their votes"


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

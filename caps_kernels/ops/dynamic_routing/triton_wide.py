"""dynamic_routing on backend "triton" where the votes of one lower capsule, J·E, are too many for a tile.

Couplings c and their gradients gb are written out, [B, I, J], which is 1/E of the votes, and a pass over the votes
does one thing: `agree` multiplies every vote with a vector of its higher capsule (for logits and gc), `gather` sums
votes with coefficients over i (for s and gV), `spread` makes the votes' gradient. Any J and any E.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from caps_kernels._triton import accumulator, launch, load, padded, program, store, strides, sum_parts
from caps_kernels.ops.precision import accumulation_dtype
from caps_kernels.ops.squash import triton as squash

ROWS = 8
"""Higher capsules at a time of `agree`, lower ones of the others."""
COLUMNS = 256
"""Elements of a vote, or of J·E, at a time."""


@triton.jit
def agree(
    votes, vectors, out, in_capsules,
    J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """out [B, I, J] = û · vectors [B, J, E]: ROWS higher capsules of a lower one a program."""
    tiles: tl.constexpr = (J + ROWS - 1) // ROWS
    number = program()
    j = number % tiles * ROWS + tl.arange(0, ROWS)
    row = number // tiles
    b, i = row // in_capsules, row % in_capsules
    total = tl.zeros((ROWS,), TYPE)
    for start in range(0, E, COLUMNS):
        e = start + tl.arange(0, COLUMNS)
        mask = (j < J)[:, None] & (e < E)[None, :]
        tile = load(votes + b * V0 + i * V1 + j[:, None] * V2 + e.to(tl.int64)[None, :] * V3, mask, TYPE)
        total += tl.sum(tile * load(vectors + (b * J + j)[:, None] * E + e[None, :], mask, TYPE), 1)
    store(out + row * J + j, total, j < J)


@triton.jit
def softmax_rows(logits, coupling, J: tl.constexpr, COLUMNS: tl.constexpr, LEAKY: tl.constexpr, TYPE: tl.constexpr):
    """coupling [B·I, J] = softmax of logits [B·I, J]: a row a program."""
    row = program() * J
    largest = tl.full((), 0.0 if LEAKY else -float("inf"), TYPE)
    for start in range(0, J, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        largest = tl.maximum(largest, tl.max(tl.where(j < J, load(logits + row + j, j < J, TYPE), -float("inf")), 0))
    total = tl.exp(-largest) if LEAKY else tl.zeros((), TYPE)
    for start in range(0, J, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        total += tl.sum(tl.where(j < J, tl.exp(load(logits + row + j, j < J, TYPE) - largest), 0.0), 0)
    for start in range(0, J, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        store(coupling + row + j, tl.exp(load(logits + row + j, j < J, TYPE) - largest) / total, j < J)


@triton.jit
def softmax_rows_gradient(coupling, gc, gb, J: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """gb [B·I, J] from coupling and gc: a row a program."""
    row = program() * J
    total = tl.zeros((), TYPE)
    for start in range(0, J, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        total += tl.sum(load(coupling + row + j, j < J, TYPE) * load(gc + row + j, j < J, TYPE), 0)
    for start in range(0, J, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        share = load(coupling + row + j, j < J, TYPE)
        store(gb + row + j, share * (load(gc + row + j, j < J, TYPE) - total), j < J)


@triton.jit
def gather(
    votes, coefficients, parts, batch, in_capsules, length,
    J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """parts [chunks, B, J, E] of Σ_i coefficients [B, I, J] û: COLUMNS of one chunk of a sample a program."""
    tiles: tl.constexpr = (J * E + COLUMNS - 1) // COLUMNS
    number = program()
    n = number % tiles * COLUMNS + tl.arange(0, COLUMNS)
    b = number // tiles % batch
    chunk = number // tiles // batch
    j, e = n // E, n % E
    total = tl.zeros((ROWS, COLUMNS), TYPE)
    stop = tl.minimum(chunk * length + length, in_capsules)
    for start in range(chunk * length, stop, ROWS):
        i = start + tl.arange(0, ROWS)
        mask = (i < stop)[:, None] & (n < J * E)[None, :]
        tile = load(votes + b * V0 + i[:, None] * V1 + (j * V2 + e * V3)[None, :], mask, TYPE)
        total += tile * load(coefficients + (b * in_capsules + i)[:, None] * J + j[None, :], mask, TYPE)
    store(parts + (chunk * batch + b) * (J * E) + n, tl.sum(total, 0), n < J * E)


@triton.jit
def spread(
    coupling, gb, g, total_v, grad_votes, iterations, batch, in_capsules,
    J: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """grad_votes [B, I, J, E] = Σ_t coupling_t g_t + gb_t V_t of coupling and gb [R, B, I, J], g and V [R, B, J, E]."""
    tiles: tl.constexpr = (J * E + COLUMNS - 1) // COLUMNS
    number = program()
    n = number % tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_tiles = (in_capsules + ROWS - 1) // ROWS
    i = number // tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    b = number // tiles // row_tiles
    mask = (i < in_capsules)[:, None] & (n < J * E)[None, :]
    total = tl.zeros((ROWS, COLUMNS), TYPE)
    for t in range(iterations):
        sample = b + t * batch
        at = (sample * in_capsules + i)[:, None] * J + (n // E)[None, :]
        one = sample * (J * E) + n
        total += load(coupling + at, mask, TYPE) * load(g + one, n < J * E, TYPE)[None, :]
        total += load(gb + at, mask, TYPE) * load(total_v + one, n < J * E, TYPE)[None, :]
    store(grad_votes + (b * in_capsules + i)[:, None] * (J * E) + n[None, :], total, mask)


def forward(
    votes: Tensor, bias: Tensor | None, iterations: int, leaky: bool, return_coupling: bool
) -> tuple[Tensor, ...]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    batch, _, out_capsules, out_dim = votes.shape
    dtype = accumulation_dtype(votes.dtype)
    s = votes.new_empty((iterations, batch, out_capsules, out_dim), dtype=dtype)
    coupling = votes.new_empty(votes.shape[:3], dtype=dtype)
    total_v = torch.zeros_like(s[0])
    for t in range(iterations):
        _couplings(votes, total_v if t > 0 else None, leaky, coupling)
        _gather(votes, coupling, s[t])
        if bias is not None:
            s[t] += bias
        v = squash.forward(s[t], -1)[0]
        total_v += v
    kept = coupling.to(votes.dtype) if return_coupling else votes.new_empty((batch, 0, out_capsules))
    return v.to(votes.dtype), s, kept


def backward(
    grad_v: Tensor, votes: Tensor, s: Tensor, iterations: int, leaky: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """grad_votes [B, I, J, E] and g [R, B, J, E] (of the last iteration alone where `last`), grad_bias's summands."""
    batch, in_capsules, out_capsules, out_dim = votes.shape
    total_v = squash.forward(s, -1)[0].cumsum(0)  # [R, B, J, E]
    kept = 1 if last else iterations
    coupling = s.new_empty((kept, *votes.shape[:3]))
    gb, g, before = torch.zeros_like(coupling), s.new_empty((kept, *s.shape[1:])), s.new_zeros((kept, *s.shape[1:]))
    gv = grad_v.to(s.dtype)
    total_grad = torch.zeros_like(gv)
    for t in reversed(range(iterations - kept, iterations)):
        at = t - (iterations - kept)
        g[at] = squash.backward(gv, s[t], -1)[0]
        _couplings(votes, total_v[t - 1] if t > 0 else None, leaky, coupling[at])
        if t == 0 or last:
            break
        before[at] = total_v[t - 1]
        _agree(votes, g[at], gb[at])
        rows = batch * in_capsules
        launch(softmax_rows_gradient, rows, coupling[at], gb[at], gb[at], **_row_sizes(votes))
        grad = torch.empty_like(total_grad)
        _gather(votes, gb[at], grad)
        total_grad = total_grad + grad
        gv = total_grad
    grad_votes = votes.new_empty(votes.shape)
    launch(
        spread,
        batch * triton.cdiv(in_capsules, ROWS) * triton.cdiv(out_capsules * out_dim, COLUMNS),
        *(coupling, gb, g, before, grad_votes, kept, batch, in_capsules),
        J=out_capsules,
        E=out_dim,
        **_tile(votes),
    )
    return grad_votes, g


def _couplings(votes: Tensor, total_v: Tensor | None, leaky: bool, coupling: Tensor) -> None:
    """Write the couplings [B, I, J] for V [B, J, E], which is None where it is 0."""
    batch, in_capsules, out_capsules, _ = votes.shape
    if total_v is None:
        coupling.fill_(1 / (out_capsules + leaky))
        return
    _agree(votes, total_v, coupling)
    launch(softmax_rows, batch * in_capsules, coupling, coupling, LEAKY=leaky, **_row_sizes(votes))


def _agree(votes: Tensor, vectors: Tensor, out: Tensor) -> None:
    """Write û · vectors [B, J, E] to out [B, I, J]."""
    batch, in_capsules, out_capsules, _ = votes.shape
    programs = batch * in_capsules * triton.cdiv(out_capsules, ROWS)
    launch(agree, programs, votes, vectors, out, in_capsules, **_sizes(votes))


def _gather(votes: Tensor, coefficients: Tensor, result: Tensor) -> None:
    """Write Σ_i coefficients [B, I, J] û to result [B, J, E]."""
    batch, in_capsules, out_capsules, out_dim = votes.shape
    length = triton.cdiv(triton.cdiv(in_capsules, isqrt(in_capsules)), ROWS) * ROWS
    chunks = triton.cdiv(in_capsules, length)
    parts = result.new_empty((chunks, *result.shape))
    programs = chunks * batch * triton.cdiv(out_capsules * out_dim, COLUMNS)
    launch(gather, programs, votes, coefficients, parts, batch, in_capsules, length, **_sizes(votes))
    sum_parts(parts, result)


def _sizes(votes: Tensor) -> dict[str, Any]:
    layout = dict(zip(("V0", "V1", "V2", "V3"), strides(votes, range(4)), strict=True))
    return {"J": votes.shape[2], "E": votes.shape[3], **layout, **_tile(votes)}


def _tile(votes: Tensor) -> dict[str, Any]:
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "TYPE": accumulator(votes.dtype)}


def _row_sizes(votes: Tensor) -> dict[str, Any]:
    """Of the kernels that take a row of coefficients at a time."""
    return {"J": votes.shape[2], "COLUMNS": min(padded(votes.shape[2]), 1024), "TYPE": accumulator(votes.dtype)}

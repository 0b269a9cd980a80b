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

from caps_kernels._triton import (
    Count,
    accumulator,
    cdiv,
    launch,
    load,
    padded,
    program,
    store,
    strides,
    sum_counts,
    sum_parts,
)
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
    """grad_votes [B, I, J, E] = Σ_{t ≥ 0} c_t g_t + Σ_{t ≥ 1} gb_t V_{t-1} of coupling [R, B, I, J] and g [R, B, J, E],
    gb and V, which begin with gb_1 and V_0.
    """
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
        at -= batch * in_capsules * J
        before = load(total_v + one - batch * (J * E), (n < J * E) & (t > 0), TYPE)
        total += load(gb + at, mask & (t > 0), TYPE) * before[None, :]
    store(grad_votes + (b * in_capsules + i)[:, None] * (J * E) + n[None, :], total, mask)


def forward(
    votes: Tensor, bias: Tensor | None, iterations: int, leaky: bool, return_coupling: bool
) -> tuple[Tensor, ...]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    batch, _, out_capsules, out_dim = votes.shape
    dtype = accumulation_dtype(votes.dtype)
    s = votes.new_empty((iterations, batch, out_capsules, out_dim), dtype=dtype)
    coupling = votes.new_empty(votes.shape[:3], dtype=dtype)
    total_v = None
    for t in range(iterations):
        _couplings(votes, total_v, leaky, coupling)
        _gather(votes, coupling, s[t])
        if bias is not None:
            s[t].add_(bias)
        v = squash.forward(s[t], -1)[0]
        if t < iterations - 1:
            total_v = v if total_v is None else total_v + v
    kept = coupling.to(votes.dtype) if return_coupling else votes.new_empty((batch, 0, out_capsules))
    return v.to(votes.dtype), s, kept


def backward(
    grad_v: Tensor, votes: Tensor, s: Tensor, iterations: int, leaky: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """grad_votes [B, I, J, E] and g [R, B, J, E] (of the last iteration alone where `last`), grad_bias's summands."""
    batch, in_capsules, out_capsules, out_dim = votes.shape
    total_v = squash.forward(s, -1)[0].cumsum(0)  # [R, B, J, E]
    kept = 1 if last else iterations
    coupling, gb = s.new_empty((kept, *votes.shape[:3])), s.new_empty((kept - 1, *votes.shape[:3]))
    g: list[Tensor] = []
    gv = grad_v.to(s.dtype)
    for t in reversed(range(iterations - kept, iterations)):
        at = t - (iterations - kept)
        g.insert(0, squash.backward(gv, s[t], -1)[0])
        _couplings(votes, total_v[t - 1] if t > 0 else None, leaky, coupling[at])
        if at == 0:
            break
        _agree(votes, g[0], gb[at - 1])
        rows = batch * in_capsules
        launch(softmax_rows_gradient, rows, coupling[at], gb[at - 1], gb[at - 1], **_row_sizes(votes))
        grad = torch.empty_like(s[0])
        _gather(votes, gb[at - 1], grad)
        gv = grad if t == iterations - 1 else gv + grad
    all_g, grad_votes = torch.stack(g), votes.new_empty(votes.shape)
    launch(
        spread,
        batch * cdiv(in_capsules, ROWS) * cdiv(out_capsules * out_dim, COLUMNS),
        *(coupling, gb, all_g, total_v, grad_votes, kept, batch, in_capsules),
        J=out_capsules,
        E=out_dim,
        **_tile(votes),
    )
    return grad_votes, all_g


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
    programs = batch * in_capsules * cdiv(out_capsules, ROWS)
    launch(agree, programs, votes, vectors, out, in_capsules, **_sizes(votes))


def _gather(votes: Tensor, coefficients: Tensor, result: Tensor) -> None:
    """Write Σ_i coefficients [B, I, J] û to result [B, J, E]."""
    batch, in_capsules, out_capsules, out_dim = votes.shape
    length, chunks = _chunks(in_capsules)
    parts = result.new_empty((chunks, *result.shape))
    programs = chunks * batch * cdiv(out_capsules * out_dim, COLUMNS)
    launch(gather, programs, votes, coefficients, parts, batch, in_capsules, length, **_sizes(votes))
    sum_parts(parts, result)


def _chunks(in_capsules: int) -> tuple[int, int]:
    """Lower capsules of a chunk, and how many chunks there are."""
    length = cdiv(cdiv(in_capsules, isqrt(in_capsules)), ROWS) * ROWS
    return length, cdiv(in_capsules, length)


def _sizes(votes: Tensor) -> dict[str, Any]:
    layout = dict(zip(("V0", "V1", "V2", "V3"), strides(votes, range(4)), strict=True))
    return {"J": votes.shape[2], "E": votes.shape[3], **layout, **_tile(votes)}


def _tile(votes: Tensor) -> dict[str, Any]:
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "TYPE": accumulator(votes.dtype)}


def _row_sizes(votes: Tensor) -> dict[str, Any]:
    """Of the kernels that take a row of coefficients at a time."""
    return {"J": votes.shape[2], "COLUMNS": min(padded(votes.shape[2]), 1024), "TYPE": accumulator(votes.dtype)}


def counts(
    votes: Tensor, bias: Tensor | None, iterations: int, last: bool, return_coupling: bool
) -> tuple[Count, Count]:
    """Of forward and backward, PyTorch's operators between the kernels included; exponentials and squash left out."""
    item, wide = votes.element_size(), accumulation_dtype(votes.dtype).itemsize
    bytes_of_bias = 0 if bias is None else bias.numel() * item
    one, later = votes.shape[0] * votes.shape[2] * votes.shape[3] * wide, iterations - 1  # Bytes of anything [B, J, E].
    coefficients = votes.shape[0] * votes.shape[1] * votes.shape[2] * wide
    s = votes.new_empty((iterations, votes.shape[0], *votes.shape[2:]), dtype=accumulation_dtype(votes.dtype))
    agreed = Count(1, votes.numel() * (item + wide), coefficients, 2 * votes.numel())
    chunks = _chunks(votes.shape[1])[1]
    gathered = Count(2, votes.numel() * (item + wide) + chunks * one, (chunks + 1) * one, 2 * votes.numel())
    filled, softmax = Count(1, 0, coefficients, 0), Count(1, 3 * coefficients, coefficients, 0)
    rounded = 0 if item == wide else one // wide * item  # Bytes of anything [B, J, E] in 16 bits.

    forward_counts = [filled, *later * [agreed, softmax], *iterations * [gathered, squash.counts(s[0], -1)[0]]]
    forward_counts += max(later - 1, 0) * [Count(1, 2 * one, one, 0)]
    forward_counts += iterations * [Count(1, one + bytes_of_bias, one, 0)] if bias is not None else []
    if rounded:
        forward_counts += [Count(1, one, rounded, 0)]
        forward_counts += [Count(1, coefficients, coefficients // wide * item, 0)] if return_coupling else []

    kept, passes = (1, 0) if last else (iterations, later)
    backward_counts = [squash.counts(s, -1)[0], Count(1, iterations * one, iterations * one, 0)]
    backward_counts += kept * [squash.counts(s[0], -1)[1]] + [Count(1, kept * one, kept * one, 0)]
    backward_counts += [filled] if passes == later else []
    backward_counts += (1 if last and later else later) * [agreed, softmax]
    backward_counts += passes * [agreed, Count(1, 4 * coefficients, coefficients, 0), gathered]
    backward_counts += max(passes - 1, 0) * [Count(1, 2 * one, one, 0)]
    spread_bytes = votes.numel() * wide + cdiv(votes.shape[1], ROWS) * one
    terms = kept + passes
    backward_counts += [Count(1, terms * spread_bytes, votes.numel() * item, 2 * terms * votes.numel())]
    backward_counts += [Count(1, rounded, one, 0)] if rounded else []
    backward_counts += [Count(1, kept * one, bytes_of_bias, 0)] if bias is not None else []
    return sum_counts(forward_counts), sum_counts(backward_counts)

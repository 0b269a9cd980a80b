"""dynamic_routing on backend "triton". reference.py has the mathematics, README.md the derivation and the counts.

An iteration is one pass over the votes: a program takes a chunk of one sample's lower capsules, some rows at a time
with all their J·E votes, and ends with the chunk's part of s. The parts are summed by the programs of the next pass,
each of which needs them all, so that nothing else is launched: R + 1 kernels forward. Backward has a pass for each
iteration but the first, from the last on, whose parts are of the gradients gV, and one that writes the votes' gradient.

Where the votes of one lower capsule are too many for a tile, triton_wide.py does the same in more passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
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
    launch,
    load,
    padded,
    program,
    store,
    strides,
    sum_parts,
)
from caps_kernels.backends import Implementation
from caps_kernels.ops.dynamic_routing import triton_wide as wide
from caps_kernels.ops.precision import accumulation_dtype
from caps_kernels.ops.squash.triton import squash_gradient, squash_of

TILE = 2048
"""Votes in a tile: several lower capsules of few votes each."""
LARGEST_TILE = 8192
"""More votes of one lower capsule are left to triton_wide.py; in float64, which takes twice the registers, half."""
PROGRAMS = 512
"""So many programs keep a large GPU busy: samples are divided into chunks until there are."""
LONGEST_CHUNK = 4096
"""Lower capsules whose votes one program may sum, for accuracy."""

SAMPLES = (
    Sample("28x28, 10 classes", {"votes": (128, 1152, 10, 16), "bias": (10, 16)}),
    Sample("59 classes", {"votes": (16, 1152, 59, 16)}, {"leaky": True}),
    Sample("100 classes", {"votes": (4, 288, 100, 32)}),
    Sample("200 classes", {"votes": (4, 288, 200, 32)}),
    Sample("too many for a tile", {"votes": (4, 64, 1000, 16)}),
    Sample("last", {"votes": (32, 288, 32, 16)}, {"routing_grad": "last"}),
    Sample("odd", {"votes": (16, 100, 7, 11)}),
)
COUNTED = (
    Sample("full", {"votes": (2, 37, 10, 16), "bias": (10, 16)}),
    Sample("five iterations", {"votes": (3, 26, 3, 5)}, {"iterations": 5, "return_coupling": True}),
    Sample("last", {"votes": (2, 37, 10, 16), "bias": (10, 16)}, {"routing_grad": "last"}),
    Sample("one iteration", {"votes": (2, 5, 3, 4), "bias": (3, 4)}, {"iterations": 1}),
    Sample("wide", {"votes": (2, 9, 3, 2100), "bias": (3, 2100)}, {"return_coupling": True}),
    Sample("wide, last", {"votes": (1, 9, 3, 2100)}, {"routing_grad": "last"}),
    Sample("wide, one iteration", {"votes": (1, 9, 3, 2100), "bias": (3, 2100)}, {"iterations": 1}),
)
"""For which the formulas of `counts` are compared with a run in the interpreter."""


@dataclass(frozen=True)
class Tiling:
    """How a sample's votes [I, J, E] are divided among programs."""

    rows: int
    """Lower capsules of a tile."""
    length: int
    """Lower capsules of a chunk."""
    chunks: int
    """How many chunks a sample has."""
    warps: int


def tiling(batch: int, in_capsules: int, votes: int) -> Tiling:
    """For samples of I lower capsules, each with so many votes once these are padded."""
    rows = max(1, min(TILE // votes, 8, padded(in_capsules)))
    enough = min(cdiv(PROGRAMS, max(batch, 1)), isqrt(in_capsules))
    wanted = max(1, enough, cdiv(in_capsules, LONGEST_CHUNK))
    length = cdiv(cdiv(in_capsules, wanted), rows) * rows
    return Tiling(rows, length, cdiv(in_capsules, length), max(4, min(8, votes * rows // 512)))


@triton.jit
def softmax(logits, j, J: tl.constexpr, LEAKY: tl.constexpr):
    """Coupling coefficients [rows, JP] of logits, 0 for j ≥ J; leaky ones leave a share to a parent of logit 0."""
    logits = tl.where((j < J)[None, :], logits, -float("inf"))
    largest = tl.max(logits, 1)
    if LEAKY:
        largest = tl.maximum(largest, 0.0)
    shares = tl.exp(logits - largest[:, None])
    total = tl.sum(shares, 1)
    if LEAKY:
        total += tl.exp(-largest)
    return shares / total[:, None]


@triton.jit
def softmax_gradient(coupling, grad):
    """gb [rows, JP] from the couplings and their gradient."""
    return coupling * (grad - tl.sum(coupling * grad, 1)[:, None])


@triton.jit
def _load_votes(votes, i, stop, b, j, e, J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip  # noqa: E501
    """û [rows, JP, EP] of sample b, 0 where there is none."""
    at = b * V0 + i[:, None, None] * V1 + j[None, :, None] * V2 + e[None, None, :] * V3
    mask = (i < stop)[:, None, None] & (j < J)[None, :, None] & (e < E)[None, None, :]
    return load(votes + at, mask, TYPE)


@triton.jit
def _sum_chunks(parts, b, chunks, at, mask, SIZE: tl.constexpr, TYPE: tl.constexpr):
    """Σ over the chunks of sample b in parts [B, chunks, J, E], in order."""
    total = tl.zeros(at.shape, TYPE)
    for chunk in range(chunks):
        total += load(parts + (b * chunks + chunk) * SIZE + at, mask, TYPE)
    return total


@triton.jit
def _total_v(s, batch, b, count, at, mask, SIZE: tl.constexpr, TYPE: tl.constexpr):
    """V = v¹ + … + v^count [JP, EP] of sample b from s [R, B, J, E]."""
    total = tl.zeros(at.shape, TYPE)
    for t in range(count):
        total += squash_of(load(s + (b + t * batch) * SIZE + at, mask, TYPE), 1)
    return total


@triton.jit(do_not_specialize=["t"])
def iterate(
    votes, bias, parts, next_parts, s, coupling, t, batch, in_capsules, chunks, length,
    J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    JP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, LEAKY: tl.constexpr, COUPLING: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Iteration t + 1: from the parts [B, chunks, J, E] of s^t, which go to s [R, B, J, E], to those of s^{t+1}."""
    b = program() // chunks
    chunk = program() % chunks
    j, e = tl.arange(0, JP), tl.arange(0, EP)
    at = j[:, None] * E + e[None, :]
    mask = (j < J)[:, None] & (e < E)[None, :]
    total_v = tl.zeros((JP, EP), TYPE)
    if t > 0:
        latest = _sum_chunks(parts, b, chunks, at, mask, J * E, TYPE)
        if BIAS:
            latest += load(bias + at, mask, TYPE)
        if chunk == 0:
            store(s + (b + (t - 1) * batch) * (J * E) + at, latest, mask)
        total_v = _total_v(s, batch, b, t - 1, at, mask, J * E, TYPE) + squash_of(latest, 1)
    total = tl.zeros((ROWS, JP, EP), TYPE)
    stop = tl.minimum(chunk * length + length, in_capsules)
    for start in range(chunk * length, stop, ROWS):
        i = start + tl.arange(0, ROWS)
        tile = _load_votes(votes, i, stop, b, j, e, J, E, V0, V1, V2, V3, TYPE)
        logits = tl.sum(tile * total_v[None, :, :], 2)
        shares = softmax(tl.where(t == 0, 0.0, logits), j, J, LEAKY)
        if COUPLING:
            to = (b * in_capsules + i)[:, None] * J + j[None, :]
            store(coupling + to, shares, (i < stop)[:, None] & (j < J)[None, :])
        total += shares[:, :, None] * tile
    store(next_parts + program() * (J * E) + at, tl.sum(total, 0), mask)


@triton.jit
def finish(
    bias, parts, s, v, t, batch, chunks,
    J: tl.constexpr, E: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, BIAS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """s^t from its parts [B, chunks, J, E], and v [B, J, E] of it: a sample a program."""
    b = program()
    j, e = tl.arange(0, JP), tl.arange(0, EP)
    at = j[:, None] * E + e[None, :]
    mask = (j < J)[:, None] & (e < E)[None, :]
    latest = _sum_chunks(parts, b, chunks, at, mask, J * E, TYPE)
    if BIAS:
        latest += load(bias + at, mask, TYPE)
    store(s + (b + (t - 1) * batch) * (J * E) + at, latest, mask)
    store(v + b * (J * E) + at, squash_of(latest, 1), mask)


@triton.jit
def _gradient_of_s(grad_v, parts, s, t, iterations, batch, b, chunks, at, mask, SIZE: tl.constexpr, TYPE: tl.constexpr):
    """g^t [JP, EP] of sample b, where t counts from 0: from grad_v for the last t, else from the parts
    [R, B, chunks, J, E] of the gradients gV that later iterations left.
    """
    grad = load(grad_v + b * SIZE + at, mask & (t == iterations - 1), TYPE)
    for later in range(t + 1, iterations):
        grad += _sum_chunks(parts, b + later * batch, chunks, at, mask, SIZE, TYPE)
    return squash_gradient(grad, load(s + (b + t * batch) * SIZE + at, mask, TYPE), 1)


@triton.jit(do_not_specialize=["t"])
def iterate_backward(
    grad_v, votes, s, parts, total_v, g, t, iterations, batch, in_capsules, chunks, length,
    J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    JP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, LEAKY: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Backward of iteration t ≥ 1, counted from 0: the parts t of [R, B, chunks, J, E], which are of the gradient of V.
    Leaves that V and g^t in total_v and g [R, B, J, E].
    """
    b = program() // chunks
    chunk = program() % chunks
    j, e = tl.arange(0, JP), tl.arange(0, EP)
    at = j[:, None] * E + e[None, :]
    mask = (j < J)[:, None] & (e < E)[None, :]
    grad = _gradient_of_s(grad_v, parts, s, t, iterations, batch, b, chunks, at, mask, J * E, TYPE)
    before = _total_v(s, batch, b, t, at, mask, J * E, TYPE)
    if chunk == 0:
        store(g + (b + t * batch) * (J * E) + at, grad, mask)
        store(total_v + (b + t * batch) * (J * E) + at, before, mask)
    total = tl.zeros((ROWS, JP, EP), TYPE)
    stop = tl.minimum(chunk * length + length, in_capsules)
    for start in range(chunk * length, stop, ROWS):
        i = start + tl.arange(0, ROWS)
        tile = _load_votes(votes, i, stop, b, j, e, J, E, V0, V1, V2, V3, TYPE)
        shares = softmax(tl.sum(tile * before[None, :, :], 2), j, J, LEAKY)
        gb = softmax_gradient(shares, tl.sum(tile * grad[None, :, :], 2))
        total += gb[:, :, None] * tile
    store(parts + ((b + t * batch) * chunks + chunk) * (J * E) + at, tl.sum(total, 0), mask)


@triton.jit
def finish_backward(
    grad_v, votes, s, parts, total_v, g, grad_votes, iterations, batch, in_capsules, chunks, length,
    J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    JP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, LEAKY: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """grad_votes [B, I, J, E], from V and g^t of every t ≥ 1 and g^0, which it leaves in g too."""
    b = program() // chunks
    chunk = program() % chunks
    j, e = tl.arange(0, JP), tl.arange(0, EP)
    at = j[:, None] * E + e[None, :]
    mask = (j < J)[:, None] & (e < E)[None, :]
    first = _gradient_of_s(grad_v, parts, s, 0, iterations, batch, b, chunks, at, mask, J * E, TYPE)
    if chunk == 0:
        store(g + b * (J * E) + at, first, mask)
    first = first / (J + LEAKY)
    stop = tl.minimum(chunk * length + length, in_capsules)
    for start in range(chunk * length, stop, ROWS):
        i = start + tl.arange(0, ROWS)
        tile = _load_votes(votes, i, stop, b, j, e, J, E, V0, V1, V2, V3, TYPE)
        result = tl.zeros((ROWS, JP, EP), TYPE) + first[None, :, :]
        for t in range(1, iterations):
            grad = load(g + (b + t * batch) * (J * E) + at, mask, TYPE)[None, :, :]
            before = load(total_v + (b + t * batch) * (J * E) + at, mask, TYPE)[None, :, :]
            shares = softmax(tl.sum(tile * before, 2), j, J, LEAKY)
            gb = softmax_gradient(shares, tl.sum(tile * grad, 2))
            result += shares[:, :, None] * grad + gb[:, :, None] * before
        to = (b * in_capsules + i)[:, None, None] * (J * E) + at[None, :, :]
        store(grad_votes + to, result, (i < stop)[:, None, None] & mask[None, :, :])


@triton.jit
def backward_last(
    grad_v, votes, s, g, grad_votes, iterations, batch, in_capsules, chunks, length,
    J: tl.constexpr, E: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
    JP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, LEAKY: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """grad_votes where the last couplings are constants; leaves g^R in g [B, J, E]."""
    b = program() // chunks
    chunk = program() % chunks
    j, e = tl.arange(0, JP), tl.arange(0, EP)
    at = j[:, None] * E + e[None, :]
    mask = (j < J)[:, None] & (e < E)[None, :]
    latest = load(s + (b + (iterations - 1) * batch) * (J * E) + at, mask, TYPE)
    grad = squash_gradient(load(grad_v + b * (J * E) + at, mask, TYPE), latest, 1)
    if chunk == 0:
        store(g + b * (J * E) + at, grad, mask)
    before = _total_v(s, batch, b, iterations - 1, at, mask, J * E, TYPE)
    stop = tl.minimum(chunk * length + length, in_capsules)
    for start in range(chunk * length, stop, ROWS):
        i = start + tl.arange(0, ROWS)
        tile = _load_votes(votes, i, stop, b, j, e, J, E, V0, V1, V2, V3, TYPE)
        logits = tl.sum(tile * before[None, :, :], 2)
        shares = softmax(tl.where(iterations == 1, 0.0, logits), j, J, LEAKY)
        to = (b * in_capsules + i)[:, None, None] * (J * E) + at[None, :, :]
        store(grad_votes + to, shares[:, :, None] * grad[None, :, :], (i < stop)[:, None, None] & mask[None, :, :])


def is_wide(votes: Tensor) -> bool:
    """Whether one lower capsule's votes are too many for a tile."""
    largest = LARGEST_TILE // 2 if votes.dtype == torch.float64 else LARGEST_TILE
    return padded(votes.shape[2]) * padded(votes.shape[3]) > largest


def forward(
    votes: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, ...]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    if is_wide(votes):
        return wide.forward(votes, bias, iterations, leaky, return_coupling)
    batch, in_capsules, out_capsules, out_dim = votes.shape
    tiles, sizes = _plan(votes)
    wanted = accumulation_dtype(votes.dtype)
    parts = votes.new_empty((2, batch, tiles.chunks, out_capsules, out_dim), dtype=wanted)
    s = votes.new_empty((iterations, batch, out_capsules, out_dim), dtype=wanted)
    v = votes.new_empty((batch, out_capsules, out_dim))
    coupling = votes.new_empty((batch, in_capsules if return_coupling else 0, out_capsules))
    given = votes if bias is None else bias.contiguous()
    for t in range(iterations):
        launch(
            iterate,
            batch * tiles.chunks,
            *(votes, given, parts[(t + 1) % 2], parts[t % 2], s, coupling),
            *(t, batch, in_capsules, tiles.chunks, tiles.length),
            **sizes,
            **_votes_layout(votes),
            ROWS=tiles.rows,
            BIAS=bias is not None,
            LEAKY=leaky,
            COUPLING=return_coupling and t == iterations - 1,
            warps=tiles.warps,
        )
    last = parts[(iterations + 1) % 2]
    launch(
        finish,
        batch,
        given,
        last,
        s,
        v,
        iterations,
        batch,
        tiles.chunks,
        **sizes,
        BIAS=bias is not None,
        warps=tiles.warps,
    )
    return v, s, coupling


def backward(
    grad_v: Tensor,
    votes: Tensor,
    bias: Tensor | None,
    s: Tensor,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, ...]:
    """grad_votes [B, I, J, E] and grad_bias [J, E] (empty where there is no bias)."""
    grad_v, s = grad_v.contiguous(), s.contiguous()
    if is_wide(votes):
        grad_votes, g = wide.backward(grad_v, votes, s, iterations, leaky, routing_grad == "last")
    elif routing_grad == "last":
        grad_votes, g = _backward_last(grad_v, votes, s, iterations, leaky)
    else:
        grad_votes, g = _backward_full(grad_v, votes, s, iterations, leaky)
    grad_bias = votes.new_empty(0 if bias is None else bias.shape)
    if bias is not None:
        sum_parts(g.flatten(0, -3), grad_bias)
    return grad_votes, grad_bias


def _backward_full(grad_v: Tensor, votes: Tensor, s: Tensor, iterations: int, leaky: bool) -> tuple[Tensor, Tensor]:
    """grad_votes [B, I, J, E] and g [R, B, J, E], through all iterations."""
    batch, in_capsules, out_capsules, out_dim = votes.shape
    tiles, sizes = _plan(votes)
    parts = s.new_empty((iterations, batch, tiles.chunks, out_capsules, out_dim))
    total_v, g, grad_votes = s.new_empty(s.shape), s.new_empty(s.shape), votes.new_empty(votes.shape)
    scalars = (iterations, batch, in_capsules, tiles.chunks, tiles.length)
    options: dict[str, Any] = {**sizes, **_votes_layout(votes), "ROWS": tiles.rows, "LEAKY": leaky}
    programs = batch * tiles.chunks
    tensors = (grad_v, votes, s, parts, total_v, g)
    for t in reversed(range(1, iterations)):
        launch(iterate_backward, programs, *tensors, t, *scalars, **options, warps=tiles.warps)
    launch(finish_backward, programs, *tensors, grad_votes, *scalars, **options, warps=tiles.warps)
    return grad_votes, g


def _backward_last(grad_v: Tensor, votes: Tensor, s: Tensor, iterations: int, leaky: bool) -> tuple[Tensor, Tensor]:
    """grad_votes [B, I, J, E] and g^R [B, J, E], the last couplings being constants."""
    batch, in_capsules, *_ = votes.shape
    tiles, sizes = _plan(votes)
    g, grad_votes = s.new_empty(s.shape[1:]), votes.new_empty(votes.shape)
    launch(
        backward_last,
        batch * tiles.chunks,
        *(grad_v, votes, s, g, grad_votes),
        *(iterations, batch, in_capsules, tiles.chunks, tiles.length),
        **sizes,
        **_votes_layout(votes),
        ROWS=tiles.rows,
        LEAKY=leaky,
        warps=tiles.warps,
    )
    return grad_votes, g


def _plan(votes: Tensor) -> tuple[Tiling, dict[str, Any]]:
    """The tiling of votes, and the compile-time arguments that all kernels take."""
    batch, in_capsules, out_capsules, out_dim = votes.shape
    width, height = padded(out_dim), padded(out_capsules)
    sizes = {"J": out_capsules, "E": out_dim, "JP": height, "EP": width, "TYPE": accumulator(votes.dtype)}
    return tiling(batch, in_capsules, height * width), sizes


def _votes_layout(votes: Tensor) -> dict[str, int]:
    return dict(zip(("V0", "V1", "V2", "V3"), strides(votes, range(4)), strict=True))


def counts(
    votes: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Count, Count]:
    """Of forward and backward; exponentials and squash left out."""
    if is_wide(votes):
        return wide.counts(votes, bias, iterations, routing_grad == "last", return_coupling)
    batch, in_capsules, out_capsules, out_dim = votes.shape
    tiles = _plan(votes)[0]
    programs, later = batch * tiles.chunks, iterations - 1
    one, item, of_sums = out_capsules * out_dim, votes.element_size(), accumulation_dtype(votes.dtype).itemsize
    all_votes, s = votes.numel() * item, batch * one * of_sums
    of_bias = one * item if bias is not None else 0
    part = programs * one * of_sums  # Bytes of every program's part, and of anything [J, E] that each reads once.
    coupling = batch * in_capsules * out_capsules * item if return_coupling else 0
    read = iterations * all_votes + later * (tiles.chunks * part + programs * of_bias) + later * (later - 1) // 2 * part
    read += part + batch * of_bias
    written = iterations * part + iterations * s + batch * one * item + coupling
    forward_count = Count(iterations + 1, read, written, 2 * votes.numel() * (2 * iterations - 1))
    grad_v = programs * one * item
    if routing_grad == "last":
        read, written, launches = all_votes + grad_v + part + later * part, all_votes + s, 1
        flop, summed = 4 * votes.numel(), s
    else:
        passes = later * (later - 1) // 2 * tiles.chunks * part + later * part + iterations * later // 2 * part
        rows = -(-in_capsules // tiles.rows) * batch
        finished = all_votes + later * tiles.chunks * part + part + rows * 2 * later * one * of_sums
        read, launches = later * all_votes + passes + grad_v + finished, iterations
        written = later * (part + 2 * s) + s + all_votes
        flop, summed = 2 * votes.numel() * (5 * iterations - 4), iterations * s
    if bias is not None:
        read, written, launches = read + summed, written + of_bias, launches + 1
    return forward_count, Count(launches, read, written, flop)


def regime(votes: Tensor, *_: Any) -> str:
    """How the votes [B, I, J, E] are divided; it depends on their shape and dtype alone."""
    if is_wide(votes):
        return "wide: coefficients written, the votes read several times an iteration"
    tiles = _plan(votes)[0]
    return f"{tiles.chunks} chunks a sample, tiles of {tiles.rows} lower capsules"


IMPLEMENTATION = Implementation(forward, backward, regime=regime)

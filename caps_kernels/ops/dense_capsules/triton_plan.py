"""How dense_capsules is divided on backend "triton", by shapes and dtype alone, and what its calls launch and move."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

from caps_kernels._triton import Count, cdiv, padded
from caps_kernels.ops.precision import accumulation_dtype

WIDEST = 8192
"""Columns J·E, both padded to powers of two, that a program can hold for one sample."""
FORWARD, BACKWARD, CONTRACTION = 8192, 8192, 4096
"""Elements of û in a tile of a pass and of the last backward pass. Forward holds û, V and s of each, 32 for a thread of
8 warps; backward holds g as well, 16 for a thread of 16 warps; the last pass holds û, V and g, 32 for one of 4.
"""
DEEP, NARROW = 16384, 256
"""float32 with up to NARROW columns takes tiles twice as large forward, which halves what is read of W."""
PROGRAMS = 108
"""So many programs of a pass give each multiprocessor of an A100 one; more parts would be more bytes than they save."""
MOST_PROGRAMS, LONG = 512, 64
"""Up to so many programs where each still has LONG lower capsules."""
SHORTEST, LONGEST = 8, 4096
"""Lower capsules of a chunk: fewer are not worth a part of s, more would cost accuracy."""
SEGMENT = 128
"""Samples whose coefficients a program of the last backward pass keeps."""
STACKED = 16
"""Dimensions of lower capsules, of one after the other, that a product of the first iteration takes at once; in float32
half as many, for its registers.
"""
COLUMNS = 64
"""Columns of û whose gradient is formed at a time."""
PLANS = 1024
"""So many plans are kept: a call on a fast GPU takes less time than making one."""


@dataclass(frozen=True)
class Pass:
    """How a pass over the votes is divided: tiles of samples by chunks of lower capsules."""

    samples: int
    tiles: int
    length: int
    chunks: int
    group: int
    """Parts that are added up at once; then the sums of groups are."""
    warps: int

    @property
    def counters(self) -> int:
        """How many arrivals are counted."""
        return self.tiles * (cdiv(self.chunks, self.group) + 1)


@dataclass(frozen=True)
class Contraction:
    """How the last pass of backward is divided: programs take units of a matrix and a span of its positions."""

    programs: int
    spans: int
    span: int
    segment: int
    rows: int
    """Samples at a time."""
    parents: int
    elements: int
    dims: int
    in_parts: bool
    """Whether grad_weight is summed from parts afterwards."""


def columns(weight: Tensor) -> int:
    """Columns of û once J and E are padded."""
    return padded(weight.shape[1]) * padded(weight.shape[3])


def forward_pass(u: Tensor, weight: Tensor) -> Pass:
    """The division of a pass of the forward."""
    deep = u.dtype == torch.float32 and columns(weight) <= NARROW
    # A full tile of float64 is a quarter of others and has as many warps: with half of them it spilled.
    return divide(u, weight, DEEP if deep else FORWARD, warps=16 if u.dtype == torch.float64 else 8)


def backward_pass(u: Tensor, weight: Tensor) -> Pass:
    """The division of a pass of the backward."""
    return divide(u, weight, BACKWARD, warps=16)


def divide(u: Tensor, weight: Tensor, elements: int, warps: int) -> Pass:
    """Tiles of up to so many elements, and chunks; by shapes and dtype alone."""
    return _divide(u.shape[0], u.shape[1], columns(weight), u.dtype == torch.float64, elements, warps)


@lru_cache(PLANS)
def _divide(batch: int, in_capsules: int, width: int, exact: bool, elements: int, warps: int) -> Pass:
    """As `divide`, where û has so many columns."""
    most = max(1, min(elements // (4 if exact else 1) // width, 64))
    samples = min(most, padded(max(batch, 1), 1 if exact else 8))
    tiles = cdiv(batch, samples)
    few, many = cdiv(PROGRAMS, max(tiles, 1)), cdiv(MOST_PROGRAMS, max(tiles, 1))
    wanted = max(min(many, max(few, in_capsules // LONG)), cdiv(in_capsules, LONGEST))
    length = max(cdiv(in_capsules, wanted), min(SHORTEST, in_capsules))
    chunks = cdiv(in_capsules, length)
    group = isqrt(chunks - 1) + 1 if chunks > 1 else 1
    # A tile of few elements has few warps, down to 4; those of float64 count twice.
    filled = warps * samples * width * (2 if exact else 1) // FORWARD
    return Pass(samples, tiles, length, chunks, group, max(4, min(warps, filled)))


def contraction(u: Tensor, weight: Tensor) -> Contraction:
    """The division of the last pass of backward."""
    return _contraction(u.shape, weight.shape, u.dtype == torch.float64)


@lru_cache(PLANS)
def _contraction(of_u: torch.Size, of_weight: torch.Size, exact: bool) -> Contraction:
    """As `contraction`, of shapes."""
    batch, in_capsules, in_dim = of_u
    types, out_capsules, _, out_dim = of_weight
    positions = in_capsules // types
    spans = min(positions, cdiv(MOST_PROGRAMS, types))
    span = cdiv(positions, spans)
    spans = cdiv(positions, span)
    elements = min(padded(out_dim), 32 if exact else COLUMNS)
    return Contraction(
        programs=min(types * spans, MOST_PROGRAMS),
        spans=spans,
        span=span,
        segment=min(SEGMENT, max(batch, 1)),
        rows=min(4, padded(max(batch, 1))) if exact else 16,
        # A product takes at least 8 columns, so that parents that are not there may be among them.
        parents=min(padded(out_capsules, max(1, 16 // elements)), (32 if exact else COLUMNS) // elements),
        elements=elements,
        dims=min(padded(in_dim), 4) if exact else 16,
        in_parts=positions > 1 or batch > SEGMENT,
    )


def counts(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: int,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Count, Count]:
    """Of forward and backward, for a batch that is not empty; exponentials and squash left out."""
    batch, in_capsules, in_dim = u.shape
    _, out_capsules, _, out_dim = weight.shape
    item, wide = u.element_size(), accumulation_dtype(u.dtype).itemsize
    later, size = iterations - 1, batch * out_capsules * out_dim
    of_bias = 0 if bias is None else size * item
    votes = size * in_capsules
    ahead = forward_pass(u, weight)
    streamed, part = _of_pass(u, weight, ahead)
    coupling = batch * in_capsules * out_capsules * item if return_coupling else 0
    read = iterations * (streamed + part + of_bias) + (later * ahead.chunks + max(later - 1, 0)) * size * wide
    written = 4 * iterations * ahead.counters + iterations * part + (iterations + later) * size * wide
    flop = 2 * votes * (in_dim * iterations + 2 * later)
    first = Count(iterations + 1, read, written + size * item + coupling, flop)

    back, full = backward_pass(u, weight), routing_grad == "full"
    streamed, part = _of_pass(u, weight, back)
    read, written = size * (iterations * wide + item), iterations * (4 * back.counters + size * wide)
    launches, flop = 2, 0
    if full and later:
        read += later * (streamed + part + (2 * back.chunks + 1) * size * wide) + (later - 1) * size * wide
        written += later * (part + 2 * size * wide)
        launches, flop = launches + later, later * 2 * votes * (in_dim + 3)
    of_contraction = _of_contraction(u, weight, iterations, not full and later > 0)
    summed = 0 if bias is None else (iterations if full else 1) * size * wide
    how = contraction(u, weight)
    if how.in_parts:
        summed += how.spans * weight.numel() * wide
        written += weight.numel() * item
    if bias is not None:
        written += bias.numel() * item
    launches += 1 if how.in_parts or bias is not None else 0
    read, written = read + summed + of_contraction.read, written + of_contraction.written
    return first, Count(launches, read, written, flop + of_contraction.flop)


def _of_pass(u: Tensor, weight: Tensor, plan: Pass) -> tuple[int, int]:
    """Bytes of u and W that a pass reads, and of parts, which it writes and reads again."""
    matrix, item = weight[0].numel(), u.element_size()
    part = u.shape[0] * weight.shape[1] * weight.shape[3] * accumulation_dtype(u.dtype).itemsize
    read = u.numel() * item + plan.tiles * u.shape[1] * matrix * item
    return read, (plan.chunks + cdiv(plan.chunks, plan.group)) * part


def _of_contraction(u: Tensor, weight: Tensor, iterations: int, constant: bool) -> Count:
    """What `contract` reads, writes and computes."""
    batch, in_capsules, in_dim = u.shape
    _, out_capsules, _, out_dim = weight.shape
    how, samples = contraction(u, weight), divide(u, weight, CONTRACTION, warps=4).samples
    item, wide = u.element_size(), accumulation_dtype(u.dtype).itemsize
    segments = [min(how.segment, batch - first) for first in range(0, batch, how.segment)]
    tiles = sum(cdiv(segment, samples) for segment in segments)
    terms, kinds = (1, 1) if constant else (iterations - 1, 2)  # c alone, or c and gb
    votes, matrices = batch * in_capsules * out_capsules * out_dim, in_capsules * weight[0].numel()
    coefficients = terms * kinds * batch * in_capsules * out_capsules * wide
    read = written = flop = 0
    if iterations > 1:
        read += u.numel() * item + tiles * matrices * item + terms * kinds * votes * wide
        written += coefficients
        flop += 2 * votes * (in_dim + terms * kinds)
    deep, wide_blocks = cdiv(in_dim, how.dims), cdiv(out_dim, how.elements)
    blocks = cdiv(out_capsules, how.parents) * wide_blocks
    formed = terms * kinds + (0 if constant else 1)
    read += deep * (formed * votes * wide + wide_blocks * coefficients)
    read += len(segments) * matrices * item + blocks * u.numel() * item + (blocks - 1) * u.numel() * wide
    written += u.numel() * item + (blocks - 1) * u.numel() * wide
    of_weight = wide if how.in_parts else item
    read += (len(segments) * matrices - how.spans * weight.numel()) * of_weight
    written += len(segments) * matrices * of_weight
    return Count(1, read, written, flop + 2 * votes * (deep * formed + 2 * in_dim))

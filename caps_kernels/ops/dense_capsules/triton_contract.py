"""The last pass of triton.py's backward: coefficients, the gradient of û from them, and its products with u and W."""

from __future__ import annotations

import triton
import triton.language as tl

from caps_kernels._triton import load, program, store
from caps_kernels.ops.dense_capsules.triton_kernels import (
    agreement,
    coefficients,
    dot,
    make_votes,
    numbers,
    place,
    softmax,
)


@triton.jit
def _keep_coefficients(
    u, weight, total_v, g, kept, first, stop, iterations, batch,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    U0: tl.constexpr, U2: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, DEPTH: tl.constexpr, FAR: tl.constexpr,
    SEGMENT: tl.constexpr, LEAKY: tl.constexpr, CONSTANT: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write c and gb of a lower capsule, samples first … stop, into kept [R - 1, 2, SEGMENT, J]."""
    row, n, jp = numbers(SAMPLES, FAR), numbers(JP * EP, FAR), tl.arange(0, JP)
    size = batch * (J * E)
    for start in range(first, stop, SAMPLES):
        at, mask = place(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), stop - start, J, E, EP)
        votes = make_votes(
            u + start * U0, weight, row, n, stop - start,
            J, D, E, U0, U2, W1, W2, W3, EP, DEPTH, FAR, TYPE, OPERAND, PRECISION,
        )  # fmt: skip
        to = kept + (start - first) * J + tl.arange(0, SAMPLES)[:, None] * J + jp[None, :]
        inside = (row < stop - start)[:, None] & (jp < J)[None, :]
        for t in range(iterations - 1 if CONSTANT else 1, iterations):
            before = load(total_v + (t - 1) * size + start * (J * E) + at, mask, TYPE)
            if CONSTANT:
                shares = softmax(agreement(votes, before, JP, EP), J, JP, LEAKY)
            else:
                grad = load(g + t * size + start * (J * E) + at, mask, TYPE)
                shares, gb = coefficients(votes, before, grad, J, JP, EP, LEAKY)
                store(to + (2 * t - 1) * SEGMENT * J, gb, inside)
            store(to + (2 * t - 2) * SEGMENT * J, shares, inside)


@triton.jit
def _grad_votes(
    total_v, g, kept, b, first, j, e, iterations, batch,
    J: tl.constexpr, E: tl.constexpr, SEGMENT: tl.constexpr, LEAKY: tl.constexpr, CONSTANT: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """gû [samples, parents · elements] of the capsule whose coefficients are kept."""
    there = (b < batch)[:, None] & (j < J)[None, :]
    mask = there[:, :, None] & (e < E)[None, None, :]
    at = b[:, None, None] * (J * E) + j[None, :, None] * E + e[None, None, :]
    from_ = kept + (b - first)[:, None] * J + j[None, :]
    size = batch * (J * E)
    total = tl.zeros(at.shape, TYPE) if CONSTANT else load(g + at, mask, TYPE) / (J + LEAKY)
    for t in range(iterations - 1 if CONSTANT else 1, iterations):
        shares = load(from_ + (2 * t - 2) * SEGMENT * J, there, TYPE)
        total += shares[:, :, None] * load(g + t * size + at, mask, TYPE)
        if not CONSTANT:
            gb = load(from_ + (2 * t - 1) * SEGMENT * J, there, TYPE)
            total += gb[:, :, None] * load(total_v + (t - 1) * size + at, mask, TYPE)
    return tl.reshape(total, (at.shape[0], at.shape[1] * at.shape[2]))


@triton.jit
def contract(
    u, weight, total_v, g, kept, grad_u, partial_u, grad_weight, iterations, batch, types, spans, span,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, DEPTH: tl.constexpr, FAR: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PARENTS: tl.constexpr, ELEMENTS: tl.constexpr, DIMS: tl.constexpr,
    LEAKY: tl.constexpr, CONSTANT: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_u [B, I, D] and parts of grad_weight [spans, T, J, D, E], or itself: of a matrix and a span of its positions
    at a time, by segments of samples. Coefficients of a segment are kept, so that gû can be made by blocks of parents.
    """
    kept += program() * (2 * (iterations - 1) * SEGMENT * J)
    partial_u += program() * (SEGMENT * D)
    element_blocks: tl.constexpr = (E + ELEMENTS - 1) // ELEMENTS
    blocks: tl.constexpr = (J + PARENTS - 1) // PARENTS * element_blocks
    for unit in range(program(), types * spans, tl.num_programs(0)):
        type_, position = unit // spans, unit % spans * span
        for p in range(position, tl.minimum(position + span, P)):
            i = type_ * P + p
            for first in range(0, batch, SEGMENT):
                stop = tl.minimum(first + SEGMENT, batch)
                if iterations > 1:
                    _keep_coefficients(
                        u + i * U1, weight + type_ * W0, total_v, g, kept, first, stop, iterations, batch, J, D, E,
                        U0, U2, W1, W2, W3, SAMPLES, JP, EP, DEPTH, FAR, SEGMENT,
                        LEAKY, CONSTANT, TYPE, OPERAND, PRECISION,
                    )  # fmt: skip
                tl.debug_barrier()
                fresh = (p == position) & (first == 0)
                for deep in range(0, D, DIMS):
                    d = deep + tl.arange(0, DIMS).to(tl.int64)
                    for block in range(blocks):
                        j = block // element_blocks * PARENTS + tl.arange(0, PARENTS)
                        e = block % element_blocks * ELEMENTS + tl.arange(0, ELEMENTS)
                        _contract_block(
                            u, weight, total_v, g, kept, grad_u, partial_u,
                            grad_weight + (unit % spans * types + type_) * (J * D * E),
                            type_, i, first, stop, d, j, e, block == 0, block == blocks - 1, fresh, iterations, batch,
                            types * P, J, D, E, U0, U1, U2, W0, W1, W2, W3,
                            SEGMENT, ROWS, LEAKY, CONSTANT, TYPE, GRAD_PRECISION,
                        )  # fmt: skip
                tl.debug_barrier()


@triton.jit
def _contract_block(
    u, weight, total_v, g, kept, grad_u, partial_u, grad_weight, type_, i, first, stop, d, j, e,
    is_first, is_last, fresh, iterations, batch, in_capsules,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, LEAKY: tl.constexpr, CONSTANT: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Contract gû of some parents with u, into their block of grad_weight, and with W, into partial sums of grad_u,
    which the last block of parents completes.
    """
    columns: tl.constexpr = j.shape[0] * e.shape[0]
    there = tl.reshape((j < J)[:, None] & (e < E)[None, :], (columns,))
    in_weight = tl.reshape(j[:, None] * W1 + e[None, :] * W3, (columns,))
    mask = there[:, None] & (d < D)[None, :]
    matrix = load(weight + type_ * W0 + in_weight[:, None] + d[None, :] * W2, mask, TYPE)
    total = tl.zeros((d.shape[0], columns), TYPE)
    for start in range(first, stop, ROWS):
        b = start + tl.arange(0, ROWS)
        grad = _grad_votes(total_v, g, kept, b, first, j, e, iterations, batch, J, E, SEGMENT, LEAKY, CONSTANT, TYPE)
        inside = (b < stop)[None, :] & (d < D)[:, None]
        total = dot(load(u + i * U1 + b[None, :] * U0 + d[:, None] * U2, inside, TYPE), grad, total, PRECISION)
        inside = (b < stop)[:, None] & (d < D)[None, :]
        at = partial_u + (b - first)[:, None] * D + d[None, :]
        of_u = load(at, inside & (is_first == 0), TYPE)
        of_u = dot(grad, matrix, of_u, PRECISION)
        if is_last:
            store(grad_u + (b * in_capsules + i)[:, None] * D + d[None, :], of_u, inside)
        else:
            store(at, of_u, inside)
            tl.debug_barrier()
    in_grad = tl.reshape(j[:, None] * (D * E) + e[None, :], (columns,))
    at = grad_weight + d[:, None] * E + in_grad[None, :]
    mask = (d < D)[:, None] & there[None, :]
    store(at, total + load(at, mask & (fresh == 0), TYPE), mask)


@triton.jit
def _sum_rows(parts, result, count, size, first, PARTS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """WIDTH elements from `first` of result [size] = Σ of parts [count, size]."""
    part = tl.arange(0, PARTS).to(tl.int64)[:, None]
    n = first + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((PARTS, WIDTH), TYPE)
    for start in range(0, count, PARTS):
        total += load(parts + (start + part) * size + n, (start + part < count) & (n < size), TYPE)
    store(result + n, tl.sum(total, 0)[None, :], n < size)


@triton.jit
def finish_backward(
    weight_parts, grad_weight, weight_count, weight_size, weight_programs, g, grad_bias, bias_count, bias_size,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """grad_weight from its parts, and grad_bias [J, E] from g [R, B, J, E], by the first programs and the others."""
    if program() < weight_programs:
        _sum_rows(weight_parts, grad_weight, weight_count, weight_size, program() * WIDTH, PARTS, WIDTH, TYPE)
    else:
        first = (program() - weight_programs) * WIDTH
        _sum_rows(g, grad_bias, bias_count, bias_size, first, PARTS, WIDTH, TYPE)

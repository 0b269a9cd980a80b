"""The passes of triton.py: what one program does of an iteration, forward or backward.

A program of a pass takes a tile of samples, whose V it keeps, and a chunk of lower capsules. For each capsule it makes
û [samples, J·E] with one product, and from it couplings and its share of s, or backward of the gradient of V.
Columns n of û are j·EP + e, both padded to powers of two.

Parts of a tile's chunks are summed by whichever program comes last (`join`), always in the same order: in groups, then
the groups. So a pass ends with s, and the next one starts with V. Counting who is last is the only atomic operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from caps_kernels._triton import load, program, store
from caps_kernels.ops.squash.triton import squash_gradient, squash_of


@triton.jit
def _coarse(x):
    """float32 with the mantissa of TF32, cut off, so that what is left is exact too."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. "tf32x3" is the sum of three products of TF32, with the error of float32; Triton's own
    takes a second accumulator, for which there are no registers. float64 goes without `tl.dot`, which not every GPU
    has for it.
    """
    if total.dtype == tl.float64:
        total += tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif PRECISION == "tf32x3" and a.dtype == tl.float32:
        high_a, high_b = _coarse(a), _coarse(b)
        total = tl.dot(high_a, b - high_b, total, input_precision="tf32", out_dtype=tl.float32)
        total = tl.dot(a - high_a, high_b, total, input_precision="tf32", out_dtype=tl.float32)
        total = tl.dot(high_a, high_b, total, input_precision="tf32", out_dtype=tl.float32)
    else:
        exact: tl.constexpr = "ieee" if PRECISION == "tf32x3" else PRECISION
        total = tl.dot(a, b, total, input_precision=exact, out_dtype=tl.float32)
    return total


@triton.jit
def _columns(n, J: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Parent, element and whether there is one, of columns n = j·EP + e."""
    j, e = n // EP, n % EP
    return j, e, (j < J) & (e < E)


@triton.jit
def numbers(COUNT: tl.constexpr, FAR: tl.constexpr):
    """0, 1, … in 64 bits where strides within a tile need them, in 32 where not: that halves what addresses take."""
    return tl.arange(0, COUNT).to(tl.int64) if FAR else tl.arange(0, COUNT)


@triton.jit
def place(row, n, samples, J: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Where rows and columns n of a tile lie in a contiguous [samples, J, E] that starts with it; which are there."""
    j, e, there = _columns(n, J, E, EP)
    return row[:, None] * (J * E) + (j * E + e)[None, :], (row < samples)[:, None] & there[None, :]


@triton.jit
def make_votes(
    u, weight, row, n, samples,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    U0: tl.constexpr, U2: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    EP: tl.constexpr, DEPTH: tl.constexpr, FAR: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """û [rows, columns] of a lower capsule, from u and weight at its first sample and matrix.

    The product is of Wᵀ and uᵀ: J·E is large enough for the rows that matrix units want, also where samples are few.
    DEPTH = 0 stands for sums without matrix units: for float64, and where even 8 samples are too many.
    """
    j, e, there = _columns(n, J, E, EP)
    at_n, present = j * W1 + e * W3, row < samples
    if DEPTH == 0:
        total = tl.zeros((row.shape[0], n.shape[0]), TYPE)
        for d in range(D):
            left = load(u + row * U0 + d * U2, present, TYPE)
            total += left[:, None] * load(weight + d * W2 + at_n, there, TYPE)[None, :]
    else:
        total = tl.zeros((n.shape[0], row.shape[0]), TYPE)
        for start in tl.static_range(0, D, DEPTH):
            d = start + numbers(DEPTH, FAR)
            left = load(weight + at_n[:, None] + d[None, :] * W2, there[:, None] & (d < D)[None, :], OPERAND)
            right = load(u + d[:, None] * U2 + (row * U0)[None, :], (d < D)[:, None] & present[None, :], OPERAND)
            total = dot(left, right, total, PRECISION)
        total = tl.trans(total)
    return total


@triton.jit
def agreement(votes, with_, JP: tl.constexpr, EP: tl.constexpr):
    """votes_ij · with_j [samples, JP]."""
    return tl.sum(tl.reshape(votes * with_, (votes.shape[0], JP, EP)), 2)


@triton.jit
def _spread(shares, JP: tl.constexpr, EP: tl.constexpr):
    """Numbers of parents [samples, JP] for each of their columns [samples, JP·EP]."""
    wide = tl.broadcast_to(shares[:, :, None], (shares.shape[0], JP, EP))
    return tl.reshape(wide, (shares.shape[0], JP * EP))


@triton.jit
def softmax(logits, J: tl.constexpr, JP: tl.constexpr, LEAKY: tl.constexpr):
    """Couplings [samples, JP] of logits, 0 beyond J; leaky ones leave a share to a parent of logit 0."""
    logits = tl.where((tl.arange(0, JP) < J)[None, :], logits, -float("inf"))
    largest = tl.max(logits, 1)
    if LEAKY:
        largest = tl.maximum(largest, 0.0)
    shares = tl.exp(logits - largest[:, None])
    total = tl.sum(shares, 1)
    if LEAKY:
        total += tl.exp(-largest)
    return shares / total[:, None]


@triton.jit
def _sum(parts, first, step, count, size, at, mask, TYPE: tl.constexpr):
    """Σ of parts [chunks, B, J, E] number first, first + step, …, in this order."""
    total = tl.zeros(at.shape, TYPE)
    for k in range(count):
        total += load(parts + (first + k * step) * size + at, mask, TYPE)
    return total


@triton.jit
def _join(part, parts, arrivals, tile, chunk, chunks, group, size, at, mask, TYPE: tl.constexpr):
    """Leave a chunk's part, and add up those of its group where it is the group's last to come. Whether it is the last
    of all: then every group's sum is in place of its first part.

    Releases what this program wrote before it counts itself, and acquires what others did: barriers extend both to
    all threads of the program.
    """
    groups = tl.cdiv(chunks, group)
    arrivals += tile * (groups + 1)
    store(parts + chunk * size + at, part, mask)
    tl.debug_barrier()
    mine = chunk // group
    members = tl.minimum(group, chunks - mine * group)
    before = tl.atomic_add(arrivals + 1 + mine, 1, sem="acq_rel")
    last = before < 0
    if before == members - 1:
        tl.debug_barrier()
        store(parts + mine * group * size + at, _sum(parts, mine * group, 1, members, size, at, mask, TYPE), mask)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals, 1, sem="acq_rel") == groups - 1
        tl.debug_barrier()
    return last


@triton.jit
def _finish(
    parts, bias, total_v, s, v, t, first, batch, chunks, group,
    J: tl.constexpr, E: tl.constexpr, SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr,
    BIAS: tl.constexpr, LAST: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Iteration t's end for a tile of samples, a quarter at a time: s^t, and V or, of the last, v."""
    size = batch * (J * E)
    few: tl.constexpr = (SAMPLES + 3) // 4
    for start in range(0, SAMPLES, few):
        base = (first + start) * (J * E)
        at, mask = place(tl.arange(0, few), tl.arange(0, JP * EP), batch - first - start, J, E, EP)
        total = _sum(parts + base, 0, group, tl.cdiv(chunks, group), size, at, mask, TYPE)
        if BIAS:
            total += load(bias + at % (J * E), mask, TYPE)
        store(s + t * size + base + at, total, mask)
        squashed = tl.reshape(squash_of(tl.reshape(total, (few, JP, EP)), 2), (few, JP * EP))
        if LAST:
            store(v + base + at, squashed, mask)
        else:
            squashed += load(total_v + (t - 1) * size + base + at, mask & (t > 0), TYPE)
            store(total_v + t * size + base + at, squashed, mask)


@triton.jit
def begin(
    u, weight, bias, parts, arrivals, total_v, s, v, coupling, batch, in_capsules, chunks, group, length,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, DEPTH: tl.constexpr, FAR: tl.constexpr,
    BIAS: tl.constexpr, LEAKY: tl.constexpr, COUPLING: tl.constexpr, LAST: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first iteration, whose couplings are all the same: s^0 is one product over all (i, d) of a chunk."""
    tile, chunk = program() // chunks, program() % chunks
    first = tile * SAMPLES
    u += first * U0
    row, n = numbers(SAMPLES, FAR), numbers(JP * EP, FAR)
    stop = tl.minimum(chunk * length + length, in_capsules)
    if DEPTH == 0:
        total = tl.zeros((SAMPLES, JP * EP), TYPE)
        for i in range(chunk * length, stop):
            total += make_votes(
                u + i * U1, weight + i // P * W0, row, n, batch - first,
                J, D, E, U0, U2, W1, W2, W3, EP, 0, FAR, TYPE, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        flipped = tl.zeros((JP * EP, SAMPLES), TYPE)
        j, e, there = _columns(n, J, E, EP)
        for start in tl.range(chunk * length * D, stop * D, DEPTH, disable_licm=True):
            from_ = start // D
            k = start % D + numbers(DEPTH, FAR).to(tl.int32)
            i, d = k // D, (k % D).to(n.dtype)
            type_ = ((from_ % P).to(tl.int32) + i) // P
            inside = i < stop - from_
            at = (type_.to(n.dtype) * W0 + d * W2)[None, :] + (j * W1 + e * W3)[:, None]
            left = load(weight + from_ // P * W0 + at, inside[None, :] & there[:, None], OPERAND)
            at = (row * U0)[None, :] + (i.to(n.dtype) * U1 + d * U2)[:, None]
            right = load(u + from_ * U1 + at, (row < batch - first)[None, :] & inside[:, None], OPERAND)
            flipped = dot(left, right, flipped, PRECISION)
        total = tl.trans(flipped)
    if COUPLING:
        for i in range(chunk * length, stop):
            shares = tl.full((SAMPLES, JP), 1.0, TYPE) / (J + LEAKY)
            _store_coupling(coupling + (first * in_capsules + i) * J, shares, in_capsules, batch - first, J)
    part = total / (J + LEAKY)
    at, mask = place(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    if _join(part, parts + first * (J * E), arrivals, tile, chunk, chunks, group, batch * (J * E), at, mask, TYPE):
        _finish(
            parts, bias, total_v, s, v, 0, first, batch, chunks, group, J, E, SAMPLES, JP, EP, BIAS, LAST, TYPE
        )  # fmt: skip


@triton.jit
def _store_coupling(to, shares, in_capsules, samples, J: tl.constexpr):
    """Write a lower capsule's couplings [samples, JP] into [samples, I, J], from its place on."""
    row, j = tl.arange(0, shares.shape[0]).to(tl.int64), tl.arange(0, shares.shape[1])
    store(to + row[:, None] * (in_capsules * J) + j[None, :], shares, (row < samples)[:, None] & (j < J)[None, :])


@triton.jit(do_not_specialize=["t"])
def iterate(
    u, weight, bias, parts, arrivals, total_v, s, v, coupling, t, batch, in_capsules, chunks, group, length,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, DEPTH: tl.constexpr, FAR: tl.constexpr,
    BIAS: tl.constexpr, LEAKY: tl.constexpr, COUPLING: tl.constexpr, LAST: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Iteration t ≥ 1, counted from 0: from V = v^0 + … + v^{t-1} to s^t."""
    tile, chunk = program() // chunks, program() % chunks
    first = tile * SAMPLES
    row, n = numbers(SAMPLES, FAR), numbers(JP * EP, FAR)
    at, mask = place(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    size = batch * (J * E)
    before = load(total_v + (t - 1) * size + first * (J * E) + at, mask, TYPE)
    total = tl.zeros((SAMPLES, JP * EP), TYPE)
    for i in tl.range(chunk * length, tl.minimum(chunk * length + length, in_capsules), disable_licm=True):
        votes = make_votes(
            u + first * U0 + i * U1, weight + i // P * W0, row, n, batch - first,
            J, D, E, U0, U2, W1, W2, W3, EP, DEPTH, FAR, TYPE, OPERAND, PRECISION,
        )  # fmt: skip
        shares = softmax(agreement(votes, before, JP, EP), J, JP, LEAKY)
        if COUPLING:
            _store_coupling(coupling + (first * in_capsules + i) * J, shares, in_capsules, batch - first, J)
        total += _spread(shares, JP, EP) * votes
    if _join(total, parts + first * (J * E), arrivals, tile, chunk, chunks, group, size, at, mask, TYPE):
        _finish(
            parts, bias, total_v, s, v, t, first, batch, chunks, group, J, E, SAMPLES, JP, EP, BIAS, LAST, TYPE
        )  # fmt: skip


@triton.jit
def begin_backward(
    grad_v, s, total_v, g, arrivals, rows, iterations, counters,
    J: tl.constexpr, E: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
    ROWS: tl.constexpr, EP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """V before each iteration and g of the last [R, B, J, E], for ROWS vectors; and nobody has arrived yet."""
    row = program() * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    at = row[:, None] * E + e[None, :]
    mask = (row < rows)[:, None] & (e < E)[None, :]
    total = tl.zeros((ROWS, EP), TYPE)
    for t in range(iterations - 1):
        total += squash_of(load(s + t * rows * E + at, mask, TYPE), 1)
        store(total_v + t * rows * E + at, total, mask)
    grad = load(grad_v + (row // J * G0 + row % J * G1)[:, None] + e[None, :] * G2, mask, TYPE)
    last = (iterations - 1) * rows * E
    store(g + last + at, squash_gradient(grad, load(s + last + at, mask, TYPE), 1), mask)
    for start in range(program() * ROWS, counters, tl.num_programs(0) * ROWS):
        counter = start + tl.arange(0, ROWS)
        tl.store(arrivals + counter, tl.zeros((ROWS,), tl.int32), mask=counter < counters)


@triton.jit
def coefficients(votes, before, grad, J: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, LEAKY: tl.constexpr):
    """Couplings and the gradient of their logits [samples, JP]."""
    shares = softmax(agreement(votes, before, JP, EP), J, JP, LEAKY)
    of_shares = agreement(votes, grad, JP, EP)
    return shares, shares * (of_shares - tl.sum(shares * of_shares, 1)[:, None])


@triton.jit(do_not_specialize=["t"])
def iterate_backward(
    u, weight, s, total_v, g, grad_total, parts, arrivals, t, iterations, batch, in_capsules, chunks, group, length,
    J: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, DEPTH: tl.constexpr, FAR: tl.constexpr,
    LEAKY: tl.constexpr, TYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of iteration t ≥ 1, counted from 0: the gradient of V, added to grad_total [B, J, E], and g^{t-1}."""
    tile, chunk = program() // chunks, program() % chunks
    first = tile * SAMPLES
    row, n = numbers(SAMPLES, FAR), numbers(JP * EP, FAR)
    size = batch * (J * E)
    base = first * (J * E)
    at, mask = place(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    before = load(total_v + (t - 1) * size + base + at, mask, TYPE)
    grad = load(g + t * size + base + at, mask, TYPE)
    total = tl.zeros((SAMPLES, JP * EP), TYPE)
    for i in tl.range(chunk * length, tl.minimum(chunk * length + length, in_capsules), disable_licm=True):
        votes = make_votes(
            u + first * U0 + i * U1, weight + i // P * W0, row, n, batch - first,
            J, D, E, U0, U2, W1, W2, W3, EP, DEPTH, FAR, TYPE, OPERAND, PRECISION,
        )  # fmt: skip
        gb = coefficients(votes, before, grad, J, JP, EP, LEAKY)[1]
        total += _spread(gb, JP, EP) * votes
    if _join(total, parts + base, arrivals, tile, chunk, chunks, group, size, at, mask, TYPE):
        few: tl.constexpr = (SAMPLES + 3) // 4
        for start in range(0, SAMPLES, few):
            _earlier_gradient(
                parts, s, g, grad_total, t, iterations, first + start, batch, chunks, group, J, E, few, JP, EP, TYPE
            )


@triton.jit
def _earlier_gradient(
    parts, s, g, grad_total, t, iterations, first, batch, chunks, group,
    J: tl.constexpr, E: tl.constexpr, SAMPLES: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """g^{t-1} of some samples, once all parts of the gradient of V are there."""
    size, base = batch * (J * E), first * (J * E)
    at, mask = place(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    total = _sum(parts + base, 0, group, tl.cdiv(chunks, group), size, at, mask, TYPE)
    total += load(grad_total + base + at, mask & (t < iterations - 1), TYPE)
    # Several threads hold an element of a small tile: all must have read it before one of them writes.
    tl.debug_barrier()
    store(grad_total + base + at, total, mask)
    latest = load(s + (t - 1) * size + base + at, mask, TYPE)
    earlier = squash_gradient(tl.reshape(total, (SAMPLES, JP, EP)), tl.reshape(latest, (SAMPLES, JP, EP)), 2)
    store(g + (t - 1) * size + base + at, tl.reshape(earlier, (SAMPLES, JP * EP)), mask)

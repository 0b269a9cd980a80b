"""The kernels of triton.py: what one program does of a dense capsule layer, forward and backward.

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
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. "tf32x3" is the sum of three products of TF32, with the error of float32; Triton's own takes a second
    accumulator, for which there are no registers. float64, which `tl.dot` does not have on every GPU, goes
    without.
    """
    if total.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        high_a, high_b = _coarse(a), _coarse(b)
        total = tl.dot(a - high_a, high_b, total, input_precision="tf32", out_dtype=tl.float32)
        total = tl.dot(high_a, b - high_b, total, input_precision="tf32", out_dtype=tl.float32)
        return tl.dot(high_a, high_b, total, input_precision="tf32", out_dtype=tl.float32)
    return tl.dot(a, b, total, input_precision="ieee" if PRECISION == "tf32x3" else PRECISION, out_dtype=tl.float32)


@triton.jit
def _columns(n, J: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Parent, element and whether there is one, of columns n = j·EP + e."""
    j, e = n // EP, n % EP
    return j, e, (j < J) & (e < E)


@triton.jit
def _range(COUNT: tl.constexpr, FAR: tl.constexpr):
    """0, 1, … in 64 bits where strides within a tile need them, in 32 where not: that halves what addresses take."""
    numbers = tl.arange(0, COUNT)
    return numbers.to(tl.int64) if FAR else numbers


@triton.jit
def _tile(row, n, samples, J: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Where rows and columns n of a tile lie in a contiguous [samples, J, E] that starts with it; which are there."""
    j, e, there = _columns(n, J, E, EP)
    return row[:, None] * (J * E) + (j * E + e)[None, :], (row < samples)[:, None] & there[None, :]


@triton.jit
def _votes(
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
            d = start + _range(DEPTH, FAR)
            left = load(weight + at_n[:, None] + d[None, :] * W2, there[:, None] & (d < D)[None, :], OPERAND)
            right = load(u + d[:, None] * U2 + (row * U0)[None, :], (d < D)[:, None] & present[None, :], OPERAND)
            total = _dot(left, right, total, PRECISION)
        total = tl.trans(total)
    return total


@triton.jit
def _agreement(votes, with_, JP: tl.constexpr, EP: tl.constexpr):
    """votes_ij · with_j [samples, JP]."""
    return tl.sum(tl.reshape(votes * with_, (votes.shape[0], JP, EP)), 2)


@triton.jit
def _spread(shares, JP: tl.constexpr, EP: tl.constexpr):
    """Numbers of parents [samples, JP] for each of their columns [samples, JP·EP]."""
    wide = tl.broadcast_to(shares[:, :, None], (shares.shape[0], JP, EP))
    return tl.reshape(wide, (shares.shape[0], JP * EP))


@triton.jit
def _softmax(logits, J: tl.constexpr, JP: tl.constexpr, LEAKY: tl.constexpr):
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
        at, mask = _tile(tl.arange(0, few), tl.arange(0, JP * EP), batch - first - start, J, E, EP)
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
    row, n = _range(SAMPLES, FAR), _range(JP * EP, FAR)
    stop = tl.minimum(chunk * length + length, in_capsules)
    if DEPTH == 0:
        total = tl.zeros((SAMPLES, JP * EP), TYPE)
        for i in range(chunk * length, stop):
            total += _votes(
                u + i * U1, weight + i // P * W0, row, n, batch - first,
                J, D, E, U0, U2, W1, W2, W3, EP, 0, FAR, TYPE, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        flipped = tl.zeros((JP * EP, SAMPLES), TYPE)
        j, e, there = _columns(n, J, E, EP)
        for start in tl.range(chunk * length * D, stop * D, DEPTH, disable_licm=True):
            from_ = start // D
            k = start % D + _range(DEPTH, FAR).to(tl.int32)
            i, d = k // D, (k % D).to(n.dtype)
            type_ = ((from_ % P).to(tl.int32) + i) // P
            inside = i < stop - from_
            at = (type_.to(n.dtype) * W0 + d * W2)[None, :] + (j * W1 + e * W3)[:, None]
            left = load(weight + from_ // P * W0 + at, inside[None, :] & there[:, None], OPERAND)
            at = (row * U0)[None, :] + (i.to(n.dtype) * U1 + d * U2)[:, None]
            right = load(u + from_ * U1 + at, (row < batch - first)[None, :] & inside[:, None], OPERAND)
            flipped = _dot(left, right, flipped, PRECISION)
        total = tl.trans(flipped)
    if COUPLING:
        for i in range(chunk * length, stop):
            shares = tl.full((SAMPLES, JP), 1.0, TYPE) / (J + LEAKY)
            _store_coupling(coupling + (first * in_capsules + i) * J, shares, in_capsules, batch - first, J)
    part = total / (J + LEAKY)
    at, mask = _tile(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    if _join(part, parts + first * (J * E), arrivals, tile, chunk, chunks, group, batch * (J * E), at, mask, TYPE):
        _finish(
            parts, bias, total_v, s, v, 0, first, batch, chunks, group, J, E, SAMPLES, JP, EP, BIAS, LAST, TYPE
        )  # fmt: skip


@triton.jit
def _store_coupling(to, shares, in_capsules, samples, J: tl.constexpr):
    """Write a lower capsule's couplings [samples, JP] into [samples, I, J], from its place on."""
    row, j = tl.arange(0, shares.shape[0]).to(tl.int64), tl.arange(0, shares.shape[1])
    store(to + row[:, None] * (in_capsules * J) + j[None, :], shares, (row < samples)[:, None] & (j < J)[None, :])


@triton.jit
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
    row, n = _range(SAMPLES, FAR), _range(JP * EP, FAR)
    at, mask = _tile(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    size = batch * (J * E)
    before = load(total_v + (t - 1) * size + first * (J * E) + at, mask, TYPE)
    total = tl.zeros((SAMPLES, JP * EP), TYPE)
    for i in tl.range(chunk * length, tl.minimum(chunk * length + length, in_capsules), disable_licm=True):
        votes = _votes(
            u + first * U0 + i * U1, weight + i // P * W0, row, n, batch - first,
            J, D, E, U0, U2, W1, W2, W3, EP, DEPTH, FAR, TYPE, OPERAND, PRECISION,
        )  # fmt: skip
        shares = _softmax(_agreement(votes, before, JP, EP), J, JP, LEAKY)
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
def _coefficients(votes, before, grad, J: tl.constexpr, JP: tl.constexpr, EP: tl.constexpr, LEAKY: tl.constexpr):
    """Couplings and the gradient of their logits [samples, JP]."""
    shares = _softmax(_agreement(votes, before, JP, EP), J, JP, LEAKY)
    of_shares = _agreement(votes, grad, JP, EP)
    return shares, shares * (of_shares - tl.sum(shares * of_shares, 1)[:, None])


@triton.jit
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
    row, n = _range(SAMPLES, FAR), _range(JP * EP, FAR)
    size = batch * (J * E)
    base = first * (J * E)
    at, mask = _tile(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    before = load(total_v + (t - 1) * size + base + at, mask, TYPE)
    grad = load(g + t * size + base + at, mask, TYPE)
    total = tl.zeros((SAMPLES, JP * EP), TYPE)
    for i in tl.range(chunk * length, tl.minimum(chunk * length + length, in_capsules), disable_licm=True):
        votes = _votes(
            u + first * U0 + i * U1, weight + i // P * W0, row, n, batch - first,
            J, D, E, U0, U2, W1, W2, W3, EP, DEPTH, FAR, TYPE, OPERAND, PRECISION,
        )  # fmt: skip
        gb = _coefficients(votes, before, grad, J, JP, EP, LEAKY)[1]
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
    at, mask = _tile(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), batch - first, J, E, EP)
    total = _sum(parts + base, 0, group, tl.cdiv(chunks, group), size, at, mask, TYPE)
    total += load(grad_total + base + at, mask & (t < iterations - 1), TYPE)
    store(grad_total + base + at, total, mask)
    latest = load(s + (t - 1) * size + base + at, mask, TYPE)
    earlier = squash_gradient(tl.reshape(total, (SAMPLES, JP, EP)), tl.reshape(latest, (SAMPLES, JP, EP)), 2)
    store(g + (t - 1) * size + base + at, tl.reshape(earlier, (SAMPLES, JP * EP)), mask)


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
    row, n, jp = _range(SAMPLES, FAR), _range(JP * EP, FAR), tl.arange(0, JP)
    size = batch * (J * E)
    for start in range(first, stop, SAMPLES):
        at, mask = _tile(tl.arange(0, SAMPLES), tl.arange(0, JP * EP), stop - start, J, E, EP)
        votes = _votes(
            u + start * U0, weight, row, n, stop - start,
            J, D, E, U0, U2, W1, W2, W3, EP, DEPTH, FAR, TYPE, OPERAND, PRECISION,
        )  # fmt: skip
        to = kept + (start - first) * J + tl.arange(0, SAMPLES)[:, None] * J + jp[None, :]
        inside = (row < stop - start)[:, None] & (jp < J)[None, :]
        for t in range(iterations - 1 if CONSTANT else 1, iterations):
            before = load(total_v + (t - 1) * size + start * (J * E) + at, mask, TYPE)
            if CONSTANT:
                shares = _softmax(_agreement(votes, before, JP, EP), J, JP, LEAKY)
            else:
                grad = load(g + t * size + start * (J * E) + at, mask, TYPE)
                shares, gb = _coefficients(votes, before, grad, J, JP, EP, LEAKY)
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
        total = _dot(load(u + i * U1 + b[None, :] * U0 + d[:, None] * U2, inside, TYPE), grad, total, PRECISION)
        inside = (b < stop)[:, None] & (d < D)[None, :]
        at = partial_u + (b - first)[:, None] * D + d[None, :]
        of_u = load(at, inside & (is_first == 0), TYPE)
        of_u = _dot(grad, matrix, of_u, PRECISION)
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

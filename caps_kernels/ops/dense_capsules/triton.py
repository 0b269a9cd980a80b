"""dense_capsules on backend "triton": its launches. triton_plan.py has tiles and counts,
triton_kernels.py the passes, triton_contract.py the last one of backward; README.md says why.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from caps_kernels._triton import (
    LEAST_DEPTH,
    Sample,
    accumulator,
    architecture,
    cdiv,
    dot_precision,
    launch,
    operand,
    padded,
    strides,
)
from caps_kernels.backends import Implementation
from caps_kernels.ops.dense_capsules import triton_contract as last
from caps_kernels.ops.dense_capsules import triton_kernels as kernels
from caps_kernels.ops.dense_capsules.triton_plan import (
    CONTRACTION,
    PLANS,
    STACKED,
    WIDEST,
    Pass,
    backward_pass,
    columns,
    contraction,
    counts,
    divide,
    forward_pass,
)
from caps_kernels.ops.precision import accumulation_dtype

SAMPLES = (
    Sample("28x28, 10 classes", {"u": (128, 1152, 8), "weight": (1152, 10, 8, 16)}),
    Sample("shared", {"u": (64, 1152, 8), "weight": (32, 20, 8, 16), "bias": (20, 16)}, {"positions": 36}),
    Sample("32 classes of 16 dimensions", {"u": (64, 288, 16), "weight": (288, 32, 16, 16)}, {"leaky": True}),
    Sample("59 classes", {"u": (16, 1152, 8), "weight": (1152, 59, 8, 16)}),
    Sample("odd", {"u": (33, 100, 7), "weight": (100, 5, 7, 11), "bias": (5, 11)}),
)
COUNTED = (
    Sample("full", {"u": (3, 20, 5), "weight": (20, 3, 5, 6), "bias": (3, 6)}),
    Sample("shared", {"u": (3, 20, 5), "weight": (4, 3, 5, 6)}, {"positions": 5, "iterations": 4}),
    Sample("several tiles", {"u": (70, 9, 3), "weight": (9, 18, 3, 16)}, {"return_coupling": True}),
    Sample("last", {"u": (3, 20, 5), "weight": (20, 3, 5, 6), "bias": (3, 6)}, {"routing_grad": "last"}),
    Sample("one iteration", {"u": (3, 20, 5), "weight": (20, 3, 5, 6)}, {"iterations": 1}),
)
"""For which the formulas of `counts` are compared with a run in the interpreter."""


def forward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: int,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, E], s [R, B, J, E] and coupling [B, I, J], or [B, 0, J] where it is not asked for."""
    batch, in_capsules, _ = u.shape
    _, out_capsules, _, out_dim = weight.shape
    plan = forward_pass(u, weight)
    size, wanted = (batch, out_capsules, out_dim), accumulation_dtype(u.dtype)
    s, v = u.new_empty((iterations, *size), dtype=wanted), u.new_empty(size)
    coupling = u.new_empty((batch, in_capsules if return_coupling else 0, out_capsules))
    parts = u.new_empty((plan.chunks, *size), dtype=wanted)
    total_v = u.new_empty((max(iterations - 1, 1), *size), dtype=wanted)
    arrivals = torch.zeros((iterations, plan.counters), dtype=torch.int32, device=u.device)
    given = u if bias is None else bias.contiguous()
    constants = _constants(u, weight, positions, plan)
    for t in range(iterations):
        is_last = t == iterations - 1
        tensors = (u, weight, given, parts, arrivals[t], total_v, s, v, coupling)
        numbers = (batch, in_capsules, plan.chunks, plan.group, plan.length)
        launch(
            kernels.begin if t == 0 else kernels.iterate,
            plan.tiles * plan.chunks,
            *tensors,
            *(() if t == 0 else (t,)),
            *numbers,
            **{**constants, **({"DEPTH": _stacked(u)} if t == 0 and constants["DEPTH"] else {})},
            BIAS=bias is not None,
            LEAKY=leaky,
            COUPLING=return_coupling and is_last,
            LAST=is_last,
            warps=_warps(u, weight, plan),
            registers=_registers_ahead(u),
        )
    return v, s, coupling


def backward(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    positions: int,
    iterations: int,
    leaky: bool,
    routing_grad: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_u [B, I, D], grad_weight [T, J, D, E] and grad_bias [J, E] (empty where there is no bias)."""
    grad_bias = u.new_empty(0 if bias is None else bias.shape)
    grad_u, grad_weight = u.new_empty(u.shape), weight.new_empty(weight.shape)
    if u.shape[0] == 0:
        return grad_u, grad_weight.zero_(), grad_bias.zero_()
    s = s.contiguous()
    total_v, g, arrivals = _begin_backward(grad_v, u, weight, s)
    if routing_grad == "full":
        _passes_backward(u, weight, s, total_v, g, arrivals, positions, leaky)
    constant = routing_grad == "last" and iterations > 1
    parts = _contract(u, weight, total_v, g, grad_u, grad_weight, positions, leaky, constant)
    _finish_backward(parts, grad_weight, g if routing_grad == "full" else g[-1:], grad_bias)
    return grad_u, grad_weight, grad_bias


def _begin_backward(grad_v: Tensor, u: Tensor, weight: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V before every iteration and g of the last [R, B, J, E], and counters that are zero."""
    iterations, batch, out_capsules, out_dim = s.shape
    total_v, g = s.new_empty(s.shape), s.new_empty(s.shape)
    counters = backward_pass(u, weight).counters
    arrivals = torch.empty((iterations, counters), dtype=torch.int32, device=u.device)
    rows = max(1, 4096 // s.element_size() // padded(out_dim))
    launch(
        kernels.begin_backward,
        cdiv(batch * out_capsules, rows),
        *(grad_v, s, total_v, g, arrivals, batch * out_capsules, iterations, arrivals.numel()),
        J=out_capsules,
        E=out_dim,
        **dict(zip(("G0", "G1", "G2"), strides(grad_v, range(3)), strict=True)),
        ROWS=rows,
        EP=padded(out_dim),
        TYPE=accumulator(u.dtype),
    )
    return total_v, g, arrivals


def _passes_backward(
    u: Tensor, weight: Tensor, s: Tensor, total_v: Tensor, g: Tensor, arrivals: Tensor, positions: int, leaky: bool
) -> None:
    """Fill g for every iteration from the last one's."""
    plan = backward_pass(u, weight)
    parts, grad_total = s.new_empty((plan.chunks, *s.shape[1:])), s.new_empty(s.shape[1:])
    constants = _constants(u, weight, positions, plan)
    for t in reversed(range(1, s.shape[0])):
        launch(
            kernels.iterate_backward,
            plan.tiles * plan.chunks,
            *(u, weight, s, total_v, g, grad_total, parts, arrivals[t], t, s.shape[0]),
            *(u.shape[0], u.shape[1], plan.chunks, plan.group, plan.length),
            **constants,
            LEAKY=leaky,
            warps=_warps_back(u, weight, plan),
        )


def _contract(
    u: Tensor,
    weight: Tensor,
    total_v: Tensor,
    g: Tensor,
    grad_u: Tensor,
    grad_weight: Tensor,
    positions: int,
    leaky: bool,
    constant: bool,
) -> Tensor | None:
    """Fill grad_u, and grad_weight or its parts [spans, T, J, D, E], which are returned."""
    iterations, batch, out_capsules, _ = g.shape
    plan, how = divide(u, weight, CONTRACTION, warps=4), contraction(u, weight)
    kept = g.new_empty((how.programs, 2 * max(iterations - 1, 0), how.segment, out_capsules))
    blocks = cdiv(out_capsules, how.parents) * cdiv(weight.shape[3], how.elements)
    partial_u = g.new_empty((how.programs if blocks > 1 else 0, how.segment, u.shape[2]))
    parts = g.new_empty((how.spans, *weight.shape)) if how.in_parts else None
    launch(
        last.contract,
        how.programs,
        *(u, weight, total_v, g, kept, grad_u, partial_u, grad_weight if parts is None else parts),
        *(iterations, batch, weight.shape[0], how.spans, how.span),
        **_constants(u, weight, positions, plan),
        SEGMENT=how.segment,
        ROWS=how.rows,
        PARENTS=how.parents,
        ELEMENTS=how.elements,
        DIMS=how.dims,
        LEAKY=leaky,
        CONSTANT=constant,
        GRAD_PRECISION=_grad_precision(u),
        warps=_warps(u, weight, plan),
        registers=_registers(u),
    )
    return parts


def _finish_backward(parts: Tensor | None, grad_weight: Tensor, g: Tensor, grad_bias: Tensor) -> None:
    """Sums over parts and over samples that are left, in one launch."""
    width, together = 64, 32
    programs = 0 if parts is None else cdiv(grad_weight.numel(), width)
    launch(
        last.finish_backward,
        programs + cdiv(grad_bias.numel(), width),
        *(g if parts is None else parts, grad_weight, 0 if parts is None else parts.shape[0], grad_weight.numel()),
        *(programs, g, grad_bias, g.shape[0] * g.shape[1], grad_bias.numel()),
        PARTS=together,
        WIDTH=width,
        TYPE=accumulator(grad_weight.dtype),
    )


def _warps(u: Tensor, weight: Tensor, plan: Pass) -> int:
    """Of a pass on the architecture at hand: 8 of AMD's, of 64 lanes, are as many threads as 16 of others. On sm_80
    tiles of few columns, and so of many samples, spill registers with 16 warps and with 4.
    """
    name = architecture(u)
    if name.startswith("sm_8") and columns(weight) <= 128:
        return 8
    return min(plan.warps, 8) if name.startswith("gfx") else plan.warps


def _warps_back(u: Tensor, weight: Tensor, plan: Pass) -> int:
    """As `_warps`, of a pass backward: on sm_100 full tiles of float64 spill with 8 warps."""
    full = u.dtype == torch.float64 and plan.warps == 8
    return 16 if full and architecture(u).startswith("sm_10") else _warps(u, weight, plan)


def _registers_ahead(u: Tensor) -> int | None:
    """What a thread of forward may take: in float64 NVIDIA's assembler, left to itself, spills up to 32 bytes."""
    return 255 if u.dtype == torch.float64 else None


def _registers(u: Tensor) -> int:
    """What a thread of the last pass may take. Left to itself NVIDIA's assembler takes fewer, so that there is room for
    more programs, and spills the rest.
    """
    return 255 if u.element_size() > 2 or architecture(u).startswith("sm_8") else 168


def _stacked(u: Tensor) -> int:
    """As `_depth`, of the first iteration, whose products take dimensions of one lower capsule after the other."""
    return STACKED if u.element_size() == 2 else max(STACKED // 2, LEAST_DEPTH)


def _constants(u: Tensor, weight: Tensor, positions: int, plan: Pass) -> dict[str, Any]:
    """The compile-time arguments of every kernel that makes û."""
    layouts = (u.shape, strides(u, range(3)), weight.shape, strides(weight, range(4)))
    return {**_sizes(*layouts, u.dtype, positions, plan.samples), "PRECISION": _precision(u)}


@lru_cache(PLANS)
def _sizes(
    of_u: torch.Size,
    u_strides: tuple[int, ...],
    of_weight: torch.Size,
    weight_strides: tuple[int, ...],
    dtype: torch.dtype,
    positions: int,
    samples: int,
) -> dict[str, Any]:
    """As `_constants`, but for the precision, which a setting decides."""
    _, out_capsules, in_dim, out_dim = of_weight
    return {
        "J": out_capsules,
        "D": in_dim,
        "E": out_dim,
        "P": positions,
        **dict(zip(("U0", "U1", "U2"), u_strides, strict=True)),
        **dict(zip(("W0", "W1", "W2", "W3"), weight_strides, strict=True)),
        "SAMPLES": samples,
        "JP": padded(out_capsules),
        "EP": padded(out_dim),
        "DEPTH": _depth(dtype, in_dim, samples),
        "FAR": _far(of_u, u_strides, of_weight, weight_strides),
        "TYPE": accumulator(dtype),
        "OPERAND": operand(dtype),
    }


def _depth(dtype: torch.dtype, in_dim: int, samples: int) -> int:
    """Dimensions of a product at a time; 0 where û is made without matrix units."""
    if dtype == torch.float64 or samples < 8:
        return 0
    return min(padded(in_dim, 16 if dtype.itemsize == 2 else LEAST_DEPTH), 16)


def _far(of_u: torch.Size, u_strides: tuple[int, ...], of_weight: torch.Size, weight_strides: tuple[int, ...]) -> bool:
    """Whether elements of a tile lie 2³¹ elements apart."""
    near = 2**31 - 1
    in_u = 64 * u_strides[0] + STACKED * u_strides[1] + of_u[2] * u_strides[2]
    matrix = sum(of_weight[n] * weight_strides[n] for n in (1, 2, 3))
    return in_u > near or STACKED * weight_strides[0] + matrix > near


def _precision(u: Tensor) -> str:
    """How û of float32 is made: as `dot_precision` says, where its "ieee" is three products of TF32 on NVIDIA's matrix
    units, whose error is that of float32; but exact ones on sm_100, where a product of these units leaves its tensor
    memory through registers, of which a tile has none left.
    """
    allowed = dot_precision(u)
    return allowed if architecture(u).startswith("sm_10") else _of_matrix_units(allowed, u)


def _grad_precision(u: Tensor) -> str:
    """Of products with gû, which is float32: TF32 suffices for gradients that are rounded to 16 bits."""
    allowed = "tf32" if u.element_size() == 2 and architecture(u).startswith("sm_") else dot_precision(u)
    return _of_matrix_units(allowed, u)


def _of_matrix_units(allowed: str, u: Tensor) -> str:
    """The precision "tf32x3" in the place of "ieee", where there are products of TF32."""
    return "tf32x3" if allowed == "ieee" and architecture(u).startswith("sm_") else allowed


def why_not(u: Tensor, weight: Tensor, *_: Any) -> str | None:
    """Too many columns for a program."""
    if columns(weight) <= WIDEST:
        return None
    return (
        f"J = {weight.shape[1]} and E = {weight.shape[3]}, padded to powers of two, make {columns(weight):,} columns "
        f"of votes; one sample's must fit in the registers of a program, which hold {WIDEST:,}"
    )


def regime(u: Tensor, weight: Tensor, *_: Any) -> str:
    """How a call is divided; it depends on shapes and dtype alone."""
    ahead, back = forward_pass(u, weight), backward_pass(u, weight)
    return (
        f"forward {ahead.tiles} x {ahead.samples} samples, {ahead.chunks} chunks; "
        f"backward {back.tiles} x {back.samples} samples, {back.chunks} chunks"
    )


__all__ = ("COUNTED", "IMPLEMENTATION", "SAMPLES", "counts")

IMPLEMENTATION = Implementation(forward, backward, why_not=why_not, regime=regime)

"""dense_capsules: a whole dense capsule layer, votes and routing in one op.

    û_ij = W_ij u_i, then dynamic routing over û

Equation 2 and procedure 1 of Sabour, Frosst & Hinton, "Dynamic Routing Between Capsules" (2017, arXiv 1710.09829).
Saved for backward are the inputs and the R total inputs s, so that a fused kernel need never store û: with b = 0 at
the start, b^t_ij = û_ij · (v^1_j + … + v^{t-1}_j), and an iteration is one pass over û.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from caps_kernels import _checks, backends
from caps_kernels._autograd import Signature, differentiable
from caps_kernels._library import define
from caps_kernels.ops.dense_capsules import cpp, cuda, reference
from caps_kernels.ops.dynamic_routing import OPTIONS, check_options, fake_grad_bias, fake_results
from caps_kernels.ops.predict_votes import check_capsules

_REFERENCE = backends.Implementation(reference.forward, reference.backward)

_forward = define(
    "dense_capsules",
    "fwd",
    f"(Tensor u, Tensor weight, Tensor? bias, SymInt positions, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda u, weight, bias, positions, iterations, leaky, routing_grad, return_coupling: fake_results(
        u,
        (u.shape[0], u.shape[1], weight.shape[1], weight.shape[3]),
        iterations,
        return_coupling,
    ),
)
_backward = define(
    "dense_capsules",
    "bwd",
    "(Tensor grad_v, Tensor u, Tensor weight, Tensor? bias, Tensor s, "
    f"SymInt positions, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad_v, u, weight, bias, s, *_: (
        u.new_empty(u.shape),
        weight.new_empty(weight.shape),
        fake_grad_bias(bias, u),
    ),
)
_dense_capsules = differentiable(
    Signature("dense_capsules", tensors=3, saved=1, batch_dims=(0, 1, 0)),
    _forward,
    _backward,
    _REFERENCE,
)


def _prepare(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    positions: int = 1,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: bool = False,
) -> tuple[Any, ...]:
    options = check_options(iterations, leaky, routing_grad, return_coupling)
    u, weight, bias = _checks.autocast(u, weight, bias)
    _checks.tensors({"u": u, "weight": weight}, {"bias": bias})
    positions = check_capsules(u, weight, positions)
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[1], weight.shape[3]))
    return u, weight, bias, positions, *options


backends.register_op("dense_capsules", _prepare)
backends.register("dense_capsules", "reference", _REFERENCE)
backends.register("dense_capsules", "cpp", cpp.IMPLEMENTATION)
backends.register("dense_capsules", "triton", backends.Lazy("caps_kernels.ops.dense_capsules.triton"))
backends.register("dense_capsules", "cuda", cuda.IMPLEMENTATION)


@overload
def dense_capsules(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    positions: int = 1,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def dense_capsules(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    positions: int = 1,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def dense_capsules(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    positions: int = 1,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a dense capsule layer: predict votes û_ij = W_ij u_i and route them by agreement.

    Args:
        u: [B, I, D], the lower capsules' output; float32, float64, float16 or bfloat16, any strides.
        weight: [T, J, D, E] of the same dtype, the transformation matrices; I = T·positions.
        bias: [J, E] of the same dtype, added to every total input s_j; or None.
        iterations: R, the number of softmaxes (the paper's r).
        positions: P, how many consecutive lower capsules share a matrix: capsule i uses weight[i // P].
        leaky: give every softmax one more parent with logit 0 and drop its share, so that a lower capsule may belong
            to no higher one.
        routing_grad: "full" differentiates through all iterations; "last" takes the last iteration's coupling
            coefficients as constants.
        return_coupling: also return the last coupling coefficients, detached.
        backend: None (the best that can run), "reference", "cpp", "cuda" or "triton".

    Returns:
        v [B, J, E] in the dtype of `u`; with `return_coupling` (v, coupling [B, I, J]). 16-bit inputs are summed in
        float32, and their votes are never rounded.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
        BackendError: the backend asked for cannot run the call.

    Source: Sabour et al. 2017 (arXiv 1710.09829), equation 2 and procedure 1.
    """
    args = _prepare(
        u,
        weight,
        bias,
        iterations,
        positions=positions,
        leaky=leaky,
        routing_grad=routing_grad,
        return_coupling=return_coupling,
    )
    v, _, coupling = _dense_capsules(*args, backends.select("dense_capsules", args, backend))
    return (v, coupling) if return_coupling else v

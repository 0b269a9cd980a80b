"""dynamic_routing: routing by agreement over votes the caller has.

Procedure 1 of Sabour, Frosst & Hinton, "Dynamic Routing Between Capsules" (2017, arXiv 1710.09829). With b = 0 at the
start, R times:

    c_ij = softmax_j(b_ij);   s_j = Σ_i c_ij û_ij + bias_j;   v_j = squash(s_j);   b_ij += û_ij · v_j (but the last)

Saved for backward are the R total inputs s; couplings are computed again. README.md derives the gradients.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from caps_kernels import _checks, backends
from caps_kernels._autograd import Signature, differentiable
from caps_kernels._library import define
from caps_kernels.ops.dynamic_routing import cpp, cuda, reference
from caps_kernels.ops.precision import accumulation_dtype

OPTIONS = "SymInt iterations, bool leaky, str routing_grad, bool return_coupling, str backend"


def fake_results(u: Tensor, sizes: tuple[int, int, int, int], iterations: int, return_coupling: bool) -> Any:
    """Empty (v, s, coupling) for the sizes (B, I, J, E) and the inputs' dtype."""
    batch, in_capsules, out_capsules, out_dim = sizes
    return (
        u.new_empty((batch, out_capsules, out_dim)),
        u.new_empty((iterations, batch, out_capsules, out_dim), dtype=accumulation_dtype(u.dtype)),
        u.new_empty((batch, in_capsules if return_coupling else 0, out_capsules)),
    )


def fake_grad_bias(bias: Tensor | None, like: Tensor) -> Tensor:
    """Empty grad_bias, of no elements where there is no bias."""
    return like.new_empty(0 if bias is None else bias.shape)


def _forward_reference(votes: Tensor, *args: Any) -> tuple[Tensor, ...]:
    v, s, coupling = reference.forward(votes, *args)
    return v.to(votes.dtype), s, coupling.to(votes.dtype)


def _backward_reference(grad_v: Tensor, votes: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(grad.to(votes.dtype) for grad in reference.backward(grad_v, votes, *args))


_REFERENCE = backends.Implementation(_forward_reference, _backward_reference)

_forward = define(
    "dynamic_routing",
    "fwd",
    f"(Tensor votes, Tensor? bias, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda votes, bias, iterations, leaky, routing_grad, return_coupling: fake_results(
        votes, votes.shape, iterations, return_coupling
    ),
)
_backward = define(
    "dynamic_routing",
    "bwd",
    f"(Tensor grad_v, Tensor votes, Tensor? bias, Tensor s, {OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda grad_v, votes, bias, s, *_: (
        votes.new_empty(votes.shape),
        fake_grad_bias(bias, votes),
    ),
)
_dynamic_routing = differentiable(
    Signature("dynamic_routing", tensors=2, saved=1, batch_dims=(0, 1, 0)),
    _forward,
    _backward,
    _REFERENCE,
)


def check_options(iterations: Any, leaky: Any, routing_grad: Any, return_coupling: Any) -> tuple[Any, ...]:
    """The options every routing op takes, checked, in the order of the schema."""
    return (
        _checks.positive_int("iterations", iterations),
        _checks.flag("leaky", leaky),
        _checks.routing_grad(routing_grad),
        _checks.flag("return_coupling", return_coupling),
    )


def _prepare(
    votes: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: bool = False,
) -> tuple[Any, ...]:
    options = check_options(iterations, leaky, routing_grad, return_coupling)
    votes, bias = _checks.autocast(votes, bias)
    _checks.tensors({"votes": votes}, {"bias": bias})
    _checks.shape("votes", votes, ("B", "I", "J", "E"), may_be_empty="B")
    if bias is not None:
        _checks.shape("bias", bias, votes.shape[2:])
    return votes, bias, *options


backends.register_op("dynamic_routing", _prepare)
backends.register("dynamic_routing", "reference", _REFERENCE)
backends.register("dynamic_routing", "cpp", cpp.IMPLEMENTATION)
backends.register("dynamic_routing", "cuda", cuda.IMPLEMENTATION)
backends.register("dynamic_routing", "triton", backends.Lazy("caps_kernels.ops.dynamic_routing.triton"))


@overload
def dynamic_routing(
    votes: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def dynamic_routing(
    votes: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def dynamic_routing(
    votes: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    *,
    leaky: bool = False,
    routing_grad: str = "full",
    return_coupling: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route votes to the higher capsules they agree on.

    Args:
        votes: [B, I, J, E], û of `predict_votes`; float32, float64, float16 or bfloat16, any strides.
        bias: [J, E] of the same dtype, added to every total input s_j; or None.
        iterations: R, the number of softmaxes (the paper's r).
        leaky: give every softmax one more parent with logit 0 and drop its share, so that a lower capsule may belong
            to no higher one.
        routing_grad: "full" differentiates through all iterations; "last" takes the last iteration's coupling
            coefficients as constants.
        return_coupling: also return the last coupling coefficients, detached.
        backend: None (the best that can run), "reference", "cpp", "cuda" or "triton".

    Returns:
        v [B, J, E] in the dtype of `votes`; with `return_coupling` (v, coupling [B, I, J]). Sums are taken in float32
        for 16-bit inputs.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
        BackendError: the backend asked for cannot run the call.

    Source: Sabour et al. 2017 (arXiv 1710.09829), procedure 1; leaky routing from the authors' published code.
    """
    args = _prepare(
        votes,
        bias,
        iterations,
        leaky=leaky,
        routing_grad=routing_grad,
        return_coupling=return_coupling,
    )
    v, _, coupling = _dynamic_routing(*args, backends.select("dynamic_routing", args, backend))
    return (v, coupling) if return_coupling else v

"""predict_votes: what each lower capsule predicts of each higher one, the "u_hat prediction".

    û_ij = W_ij u_i,    that is    û_ije = Σ_d u_id W_ijde

Equation 2 of Sabour, Frosst & Hinton, "Dynamic Routing Between Capsules" (2017, arXiv 1710.09829).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from caps_kernels import _checks, backends
from caps_kernels._autograd import Signature, differentiable
from caps_kernels._library import define
from caps_kernels.ops.predict_votes import cpp, cuda, reference

_REFERENCE = backends.Implementation(reference.forward, reference.backward)

_forward = define(
    "predict_votes",
    "fwd",
    "(Tensor u, Tensor weight, SymInt positions, str backend) -> Tensor",
    fake=lambda u, weight, positions: (u.new_empty((u.shape[0], u.shape[1], weight.shape[1], weight.shape[3])),),
)
_backward = define(
    "predict_votes",
    "bwd",
    "(Tensor grad_votes, Tensor u, Tensor weight, SymInt positions, str backend) -> (Tensor, Tensor)",
    fake=lambda grad_votes, u, weight, positions: (
        u.new_empty(u.shape),
        weight.new_empty(weight.shape),
    ),
)
_predict_votes = differentiable(
    Signature("predict_votes", tensors=2, saved=0, batch_dims=(0,)), _forward, _backward, _REFERENCE
)


def check_capsules(u: Tensor, weight: Tensor, positions: int) -> int:
    """Check u [B, I, D] against weight [T, J, D, E] with I = T·P, and return P."""
    positions = _checks.positive_int("positions", positions)
    _checks.shape("u", u, ("B", "I", "D"), may_be_empty="B")
    _checks.shape("weight", weight, ("T", "J", u.shape[2], "E"))
    in_capsules, types = u.shape[1], weight.shape[0]
    if in_capsules != types * positions:
        raise ValueError(
            f"u must have I = T·positions = {types}·{positions} = {types * positions} "
            f"input capsules for weight {list(weight.shape)}, got {in_capsules}"
        )
    return positions


def _prepare(u: Tensor, weight: Tensor, *, positions: int = 1) -> tuple[Any, ...]:
    u, weight = _checks.autocast(u, weight)
    _checks.tensors({"u": u, "weight": weight})
    return u, weight, check_capsules(u, weight, positions)


backends.register_op("predict_votes", _prepare)
backends.register("predict_votes", "reference", _REFERENCE)
backends.register("predict_votes", "cpp", cpp.IMPLEMENTATION)
backends.register("predict_votes", "cuda", cuda.IMPLEMENTATION)
backends.register("predict_votes", "triton", backends.Lazy("caps_kernels.ops.predict_votes.triton"))


def predict_votes(u: Tensor, weight: Tensor, *, positions: int = 1, backend: str | None = None) -> Tensor:
    """Predict every higher capsule from every lower one: û_ije = Σ_d u_id W_ijde.

    Args:
        u: [B, I, D], the lower capsules' output; float32, float64, float16 or bfloat16, any strides.
        weight: [T, J, D, E] of the same dtype, the transformation matrices; I = T·positions.
        positions: P, how many consecutive lower capsules share a matrix: capsule i uses weight[i // P].
        backend: None (the best that can run), "reference", "cpp", "cuda" or "triton".

    Returns:
        votes [B, I, J, E] (û, "u_hat") in the dtype of `u`; sums are taken in float32 for 16-bit inputs.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
        BackendError: the backend asked for cannot run the call.

    Source: Sabour et al. 2017 (arXiv 1710.09829), equation 2.
    """
    args = _prepare(u, weight, positions=positions)
    return _predict_votes(*args, backends.select("predict_votes", args, backend))[0]

r"""squash: shrink a vector's length into [0, 1) and keep its direction.

    v = (|s|² / (1 + |s|²)) · s / |s|

Equation 1 of Sabour, Frosst & Hinton, "Dynamic Routing Between Capsules" (2017, arXiv 1710.09829). Value and gradient
equal their limit, 0, at s = 0, and neither overflows for any finite s.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from caps_kernels import _checks, backends
from caps_kernels._autograd import Signature, differentiable
from caps_kernels._library import define
from caps_kernels.ops.squash import cpp, cuda, reference

_REFERENCE = backends.Implementation(reference.forward, reference.backward)

_forward = define(
    "squash",
    "fwd",
    "(Tensor s, int dim, str backend) -> Tensor",
    fake=lambda s, dim: (s.new_empty(s.shape),),
)
_backward = define(
    "squash",
    "bwd",
    "(Tensor grad_v, Tensor s, int dim, str backend) -> Tensor",
    fake=lambda grad_v, s, dim: (s.new_empty(s.shape),),
)
_squash = differentiable(Signature("squash", tensors=1, saved=0, any_rank=True), _forward, _backward, _REFERENCE)


def _prepare(s: Tensor, dim: int = -1) -> tuple[Any, ...]:
    _checks.tensors({"s": s})
    dim = _checks.integer("dim", dim)
    if not -s.dim() <= dim < s.dim():
        raise ValueError(f"dim must be a dimension of s, which has {s.dim()}, got {dim}")
    if s.shape[dim] < 1:
        raise ValueError(f"s must have at least 1 element along dim {dim}, got shape {list(s.shape)}")
    # Counted from the end, it stays right when vmap adds a dimension in front.
    return s, dim if dim < 0 else dim - s.dim()


backends.register_op("squash", _prepare)
backends.register("squash", "reference", _REFERENCE)
backends.register("squash", "cpp", cpp.IMPLEMENTATION)
backends.register("squash", "triton", backends.Lazy("caps_kernels.ops.squash.triton"))
backends.register("squash", "cuda", cuda.IMPLEMENTATION)


def squash(s: Tensor, dim: int = -1, *, backend: str | None = None) -> Tensor:
    """Shrink the length of vectors into [0, 1): (|s|² / (1 + |s|²)) · s / |s|.

    Args:
        s: [..., E, ...], float32, float64, float16 or bfloat16, any strides.
        dim: the dimension along which lengths are taken.
        backend: None (the best that can run), "reference", "cpp", "cuda" or "triton".

    Returns:
        v, of the shape and dtype of `s`, contiguous. 0 where s is 0.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.
        BackendError: the backend asked for cannot run the call.

    Source: Sabour et al. 2017 (arXiv 1710.09829), equation 1.
    """
    args = _prepare(s, dim)
    return _squash(*args, backends.select("squash", args, backend))[0]

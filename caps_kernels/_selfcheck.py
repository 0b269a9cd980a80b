"""Run an op on a backend, forward and backward, on small inputs, and compare with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caps_kernels import backends, functional

TOLERANCE = 1e-5
"""Largest error in float32, relative to the largest element, of outputs and gradients."""


@dataclass(frozen=True)
class Result:
    """What a check found."""

    error: float
    """The largest relative error of the output and the gradients; inf where the op raised."""
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= TOLERANCE

    def __str__(self) -> str:
        return f"ok, error {self.error:.0e}" if self.passed else f"FAILED, error {self.error:.0e}"


def _dense(u: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return functional.dense_capsules(u, weight, bias, 3, positions=3, leaky=True, backend=backend)


_CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "squash": (functional.squash, ((5, 7, 9),)),
    "predict_votes": (functional.predict_votes, ((5, 12, 7), (12, 4, 7, 9))),
    "dynamic_routing": (functional.dynamic_routing, ((5, 12, 4, 9), (4, 9))),
    "dense_capsules": (_dense, ((5, 12, 7), (4, 4, 7, 9), (4, 9))),
}


def check(op: str, backend: str) -> Result:
    """Run `op` forward and backward in float32 on `backend` against the reference in float64.

    Args:
        op: a name of `backends.ops()`.
        backend: a backend that can run it on this machine.
    """
    call, shapes = _CALLS[op]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    devices = backends.BACKENDS[backend].devices
    device = "cpu" if devices is None or "cpu" in devices else "cuda"
    try:
        got = _outputs(call, [t.to(device, torch.float32) for t in inputs], backend)
    except Exception as error:  # Whatever a broken kernel raises is the finding.
        return Result(float("inf"), f"{type(error).__name__}: {error}")
    wanted = _outputs(call, inputs, "reference")
    errors = [float((g.cpu().double() - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)]
    names = ("output", *(f"gradient {n}" for n in range(len(inputs))))
    text = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors, strict=True))
    # A NaN compares false with everything, so it must not get lost in max().
    worst = float("inf") if any(error != error for error in errors) else max(errors)
    return Result(worst, f"errors relative to the largest element: {text}; allowed {TOLERANCE:.0e}")


def _outputs(call: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = call(*inputs, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

"""Run an op on a backend, forward and backward, on small inputs, and compare with the reference in float64.

`python -m caps_kernels._selfcheck BACKEND DEVICE REPORT` does so for every op the backend has and appends one line of
JSON an op to the file REPORT: the child process of `_trust.py`, which may hang or die without harm to the program that
started it.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from caps_kernels import backends, functional

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest error by dtype, relative to the largest element, of outputs and gradients."""
SECONDS = 240
"""After which the child process ends itself, should nobody be there any more to end it."""


@dataclass(frozen=True)
class Result:
    """What a check found: of all that was run, the case nearest to its tolerance or furthest beyond it."""

    error: float
    """The largest relative error of the output and the gradients; inf where the op raised or gave a NaN."""
    tolerance: float
    detail: str
    out_of_memory: bool = False
    """The device had no room for the inputs, which says nothing about the op."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"ok, error {self.error:.0e}" if self.passed else f"FAILED, error {self.error:.0e}"


@dataclass(frozen=True)
class Call:
    """A call of a public function: its tensors' shapes, its options, and the dtypes to try."""

    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]
    dtypes: tuple[torch.dtype, ...]


ALL, COMMON = tuple(TOLERANCE), (torch.float32, torch.bfloat16)
# Of each op a call with odd sizes and options, in all dtypes, and one with the paper's sizes of capsules, for which
# kernels have tiles, and with more input capsules and samples than one block takes.
CALLS = {
    "squash": (Call(((5, 7, 9),), {}, ALL), Call(((70, 10, 16),), {}, COMMON)),
    "predict_votes": (
        Call(((5, 12, 7), (4, 4, 7, 9)), {"positions": 3}, ALL),
        Call(((17, 130, 8), (130, 10, 8, 16)), {}, COMMON),
    ),
    "dynamic_routing": (
        Call(((5, 12, 4, 9), (4, 9)), {"leaky": True}, ALL),
        Call(((17, 130, 10, 16), (10, 16)), {}, COMMON),
    ),
    "dense_capsules": (
        Call(((5, 12, 7), (4, 4, 7, 9), (4, 9)), {"positions": 3, "leaky": True}, ALL),
        Call(((17, 130, 8), (130, 10, 8, 16), (10, 16)), {}, COMMON),
    ),
}


def check(op: str, backend: str, device: str | None = None) -> Result:
    """Run `op` forward and backward on `backend` against the reference in float64.

    Args:
        op: a name of `backends.ops()`.
        backend: a backend that can run it on this machine.
        device: where to run it; None for the CPU, or for the current GPU where the backend runs on no CPU.
    """
    if device is None:
        devices = backends.BACKENDS[backend].devices
        device = "cpu" if devices is None or "cpu" in devices else "cuda"
    worst = Result(0.0, 1.0, "nothing was run")
    for call in CALLS[op]:
        for dtype in call.dtypes:
            result = _check_call(getattr(functional, op), call, dtype, backend, device)
            if not result.passed:
                return result
            worst = max(worst, result, key=lambda r: r.error / r.tolerance)
    return worst


def _check_call(function: Callable[..., Tensor], call: Call, dtype: torch.dtype, backend: str, device: str) -> Result:
    """Compare one call in one dtype."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in call.shapes]
    tolerance, where = TOLERANCE[dtype], f"{str(dtype).removeprefix('torch.')}, shapes {list(call.shapes)}"
    try:
        got = _outputs(function, [t.to(device) for t in inputs], call.options, backend)
    except Exception as error:  # Whatever a broken kernel raises is the finding.
        full = isinstance(error, torch.OutOfMemoryError)
        return Result(float("inf"), tolerance, f"{type(error).__name__}: {error} ({where})", full)
    wanted = _outputs(function, [t.double() for t in inputs], call.options, "reference")
    errors = [float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)]
    names = ("output", *(f"gradient {n}" for n in range(len(inputs))))
    text = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors, strict=True))
    # A NaN compares false with everything, so it must not get lost in max().
    worst = float("inf") if any(error != error for error in errors) else max(errors)
    return Result(
        worst, tolerance, f"errors relative to the largest element: {text}; allowed {tolerance:.0e} ({where})"
    )


def _outputs(
    function: Callable[..., Tensor], inputs: list[Tensor], options: dict[str, Any], backend: str
) -> list[Tensor]:
    """The result and one gradient an input, on the CPU."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs, **options, backend=backend)
    # Multiples of 1/64 are the same numbers in every dtype.
    grad = (torch.arange(out.numel()) % 129 - 64).div(64).view(out.shape).to(out)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, inputs, grad))]


def check_all(backend: str, device: str) -> Iterator[dict[str, Any]]:
    """A report an op as plain values, until one raises: after a fault a GPU runs nothing more in the same process."""
    for op in backends.ops():
        if backends.lacking(op, backend) is None:
            result = check(op, backend, device)
            yield {"op": op, "text": str(result), "passed": result.passed, **asdict(result)}
            if result.error == float("inf"):
                return


def main(arguments: list[str]) -> int:
    """Check a backend on a device and append a line an op to a file; an exit code of 2 says that nothing could run."""
    backend, device, report = arguments
    signal.alarm(SECONDS)
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # No op's fault: a GPU that is full, or lent to one process.
        print(f"{device} cannot be used by a second process: {error}", file=sys.stderr)
        return 2
    with open(report, "a", encoding="utf-8") as file:
        for line in check_all(backend, device):
            print(json.dumps(line), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A backend that is not there, for tests of selection and of the self-check.

`python -m tests.fake_backend KIND BACKEND DEVICE REPORT` is the self-check of one that behaves as a kind of `KINDS`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from caps_kernels import _selfcheck, backends
from caps_kernels.backends import Backend, Implementation

CPP_IS_MISSING = "no compiler in this test"


class Fake:
    """A CPU backend that runs squash as the reference does, unless its vectors are longer than 16, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.missing: str | None = None
        self.result: Callable[[Tensor], Tensor] = lambda v: v
        self.reference = backends.implementation("squash", "reference")
        self.implementation = Implementation(self.forward, self.reference.backward, self.why_not, self.regime)

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        self.calls += 1
        return (self.result(self.reference.forward(*args)[0]),)

    def why_not(self, s: Tensor, dim: int) -> str | None:
        return "vectors longer than 16" if s.shape[dim] > 16 else None

    def regime(self, s: Tensor, dim: int) -> str:
        return f"tile of {s.shape[dim]}"


def raising(error: Exception) -> Callable[[Tensor], Tensor]:
    """What a fake's result becomes where a kernel raises."""

    def result(v: Tensor) -> Tensor:
        raise error

    return result


def faulting(v: Tensor) -> Tensor:
    """Read address 0."""
    ctypes.string_at(0)
    return v


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "right": lambda v: v,
    "wrong": lambda v: v * 1.1,
    "raising": raising(OSError("the kernel is gone")),
    "full": raising(torch.OutOfMemoryError("no memory left")),
    "exiting": lambda v: os._exit(7),
    "faulting": faulting,
}


def install(monkeypatch: pytest.MonkeyPatch, *, on_trial: bool = False) -> Fake:
    """Make the CPU's backends fake, then cpp, which is missing, then the reference; and let nobody have chosen.

    With `on_trial` fake is one that is taken only after its self-check.
    """
    fake = Fake()
    table = {
        "fake": Backend("fake", "for this test", ("cpu",), lambda: fake.missing, on_trial=on_trial),
        "cpp": Backend("cpp", "missing", ("cpu",), lambda: CPP_IS_MISSING),
        "elsewhere": Backend("elsewhere", "another device's", ("xpu",), lambda: None),
        "reference": backends.BACKENDS["reference"],
    }
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("fake", "cpp", "reference")})
    monkeypatch.setattr(backends, "_IMPLEMENTATIONS", dict(backends._IMPLEMENTATIONS))
    backends.register("squash", "fake", fake.implementation)
    return fake


if __name__ == "__main__":
    install(pytest.MonkeyPatch(), on_trial=True).result = KINDS[sys.argv[1]]
    sys.exit(_selfcheck.main(sys.argv[2:]))

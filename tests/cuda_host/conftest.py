"""The libraries of the host harness, as fixtures."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_host import host


@pytest.fixture
def raw_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend "cuda" calls the ops of the host harness during the test, which loads those it needs."""
    if not host.can_compile():
        pytest.skip("no g++ to compile the kernels for the host")
    monkeypatch.setattr(torch.ops, "caps_kernels_cuda", torch.ops.caps_kernels_cuda_host, raising=False)

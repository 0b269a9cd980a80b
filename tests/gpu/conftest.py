"""Tests that need a GPU. Without one each is skipped, with the reason "no CUDA device"; but those that ask for no more
than the fixture `device` run on the CPU too where Triton interprets its kernels (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import pytest
import torch

from caps_kernels import _extension, backends

OPS = tuple(backends.ops())
GPU_BACKENDS = ("cuda", "triton")


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for GPUs. One that was not built is skipped with the reason; anything else it lacks is a failure."""
    name: str = request.param
    interpreted = name == "triton" and backends.TRITON_INTERPRETS
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cuda" and _extension.MISSING["cuda"] is not None:
        pytest.skip(_extension.MISSING["cuda"])
    return name


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest, backend: str) -> str:
    """Each op of the backend."""
    name: str = request.param
    assert backends.lacking(name, backend) is None, backends.lacking(name, backend)
    return name


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend runs: on the GPU, or interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def cuda() -> None:
    """A CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

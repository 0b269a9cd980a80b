"""Runs a test on every backend that can run the op named by its file, and C++ on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from caps_kernels import _extension, backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill the argument `backend` with the backends that run the op of `test_<op>.py` on the CPU, and `isa` with the
    instruction sets that this processor can run.
    """
    if "isa" in metafunc.fixturenames:
        missing = _extension.MISSING["cpp"]
        skipped = pytest.param("none", marks=pytest.mark.skip(reason=f"no C++ library: {missing}"))
        metafunc.parametrize("isa", [skipped] if missing is not None else _extension.isa_names(), indirect=True)
    if "backend" not in metafunc.fixturenames:
        return
    op = metafunc.module.__name__.rsplit("test_", 1)[-1]
    names = [
        name
        for name, backend in backends.BACKENDS.items()
        if (backend.devices is None or "cpu" in backend.devices) and backends.lacking(op, name) is None
    ]
    metafunc.parametrize("backend", names)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that is forced during the test."""
    with _extension.force_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

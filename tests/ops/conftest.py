"""Runs a test on every backend that can run the op named by its file."""

from __future__ import annotations

import pytest

from caps_kernels import backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill the argument `backend` with the backends that run the op of `test_<op>.py` on the CPU."""
    if "backend" not in metafunc.fixturenames:
        return
    op = metafunc.module.__name__.rsplit("test_", 1)[-1]
    names = [
        name
        for name, backend in backends.BACKENDS.items()
        if (backend.devices is None or "cpu" in backend.devices) and backends.lacking(op, name) is None
    ]
    metafunc.parametrize("backend", names)

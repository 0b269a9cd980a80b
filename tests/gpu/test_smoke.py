"""Every op once, forward and backward, in every dtype: what `.ci/compute-sanitizer` runs."""

from __future__ import annotations

from caps_kernels import _selfcheck


def test_an_op_agrees_with_the_reference(op: str, backend: str, device: str) -> None:
    result = _selfcheck.check(op, backend, device)
    assert result.passed, result.detail

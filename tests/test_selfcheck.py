"""`python -m caps_kernels`, the self-check behind its --check, and what the import brings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caps_kernels import __main__, _selfcheck, backends
from caps_kernels.backends import Implementation
from tests.fake_backend import CPP_IS_MISSING, Fake, install

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "an error of 1e-3": lambda v: v * 1.001,
    "one wrong element": lambda v: v.index_fill(0, torch.tensor([1]), 0.0),
    "a NaN": lambda v: v.masked_fill(v == v.max(), float("nan")),
    "infinities": lambda v: v / 0,
}


def test_the_selfcheck_passes_a_right_backend(fake: Fake) -> None:
    result = _selfcheck.check("squash", "fake")
    assert result.passed
    assert result.error < 1e-2
    assert fake.calls == sum(len(call.dtypes) for call in _selfcheck.CALLS["squash"])


@pytest.mark.parametrize("wrong", WRONG)
def test_the_selfcheck_fails_wrong_values(fake: Fake, wrong: str) -> None:
    fake.result = WRONG[wrong]
    result = _selfcheck.check("squash", "fake")
    assert not result.passed
    assert str(result).startswith("FAILED")
    assert "output" in result.detail


@pytest.mark.parametrize(("factor", "error"), [(2.0, 1.0), (float("nan"), float("inf"))])
def test_the_selfcheck_fails_wrong_gradients(fake: Fake, factor: float, error: float) -> None:
    def backward(*args: Any) -> tuple[Tensor, ...]:
        return (factor * fake.reference.backward(*args)[0],)

    backends.register("squash", "fake", Implementation(fake.forward, backward))
    result = _selfcheck.check("squash", "fake")
    assert result.error == pytest.approx(error, rel=1e-3)
    assert not result.passed


def test_the_selfcheck_fails_what_raises(fake: Fake) -> None:
    def refuse(v: Tensor) -> Tensor:
        raise OSError("the kernel is gone")

    fake.result = refuse
    result = _selfcheck.check("squash", "fake")
    assert not result.passed
    assert result.detail == "OSError: the kernel is gone (float64, shapes [(5, 7, 9)])"


def test_the_command_reports_a_failed_check(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.result = WRONG["a NaN"]
    monkeypatch.setattr(sys, "argv", ["caps_kernels", "--check"])
    assert __main__.main() == 1
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith("squash"))
    assert "FAILED" in row
    assert "ok" in row
    assert "squash on fake: errors relative to the largest element" in err
    assert f"missing: {CPP_IS_MISSING}" in out


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("flags", [[], ["--check"]], ids=["table", "check"])
def test_the_command_prints_a_row_an_op_and_a_line_a_backend(flags: list[str]) -> None:
    done = run_python("-m", "caps_kernels", *flags)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.split("\n\n")[1].splitlines()
    assert header.split() == ["op", *backends.BACKENDS]
    rows = {line.split()[0]: line for line in lines}
    assert set(rows) == set(backends.ops())
    for op, row in rows.items():
        assert ("ok, error" if flags else "runs") in row, op
        assert row.count("-") >= sum(backends.lacking(op, name) is not None for name in backends.BACKENDS)
    for name in backends.BACKENDS:
        summary = next(line for line in done.stdout.splitlines() if line.startswith(f"{name} "))
        missing = {backends.lacking(op, name) for op in backends.ops()} - {None}
        assert all(str(reason) in summary for reason in missing)
        assert missing or ": runs" in summary


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Top-level modules that `import caps_kernels` brings beyond those of torch."""
    code = "import sys, torch; before = {*sys.modules}; import caps_kernels; print(*{*sys.modules} - before)"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    return {module.split(".")[0] for module in done.stdout.split()}


@pytest.mark.parametrize(
    "package",
    ["matplotlib", "PIL", "tqdm", "resvg_py", "simple_icons_pack", "fontawesome_free_pack", "logos", "models"],
)
def test_importing_the_library_imports_no_data_or_plotting_package(imported: set[str], package: str) -> None:
    assert "caps_kernels" in imported
    assert package not in imported

"""`python -m caps_kernels.inspect`: its table, its budgets, and a few kernels of each op compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from caps_kernels import backends
from caps_kernels.inspect import __main__ as command
from caps_kernels.inspect import table
from caps_kernels.inspect.table import Row

ROW = Row("squash", "rows", "forward", "ROWS=8", "float32", "sm_90", 41, 0, 1024, 75, 4, 8, 2)

compiles = pytest.mark.skipif(
    backends.BACKENDS["triton"].missing() is not None or backends.TRITON_INTERPRETS,
    reason="Triton is not here, or interprets kernels in this process instead of compiling them",
)


def test_a_row_keeps_the_budget_made_from_it() -> None:
    budget = table.allowed(ROW)
    assert budget.registers == 48
    assert table.excess(ROW, budget) == []
    assert table.excess(replace(ROW, registers=48, occupancy=80, wide_loads=1, matrix=1), budget) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 49}, "49 registers > 48"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 1025}, "1025 bytes of shared memory > 1024"),
        ({"occupancy": 74}, "occupancy 74 % < 75 %"),
        ({"wide_loads": 0}, "no 128-bit loads"),
        ({"matrix": 0}, "no instructions of the matrix units"),
    ],
)
def test_more_than_the_budget_is_told(change: dict[str, int], said: str) -> None:
    (found,) = table.excess(replace(ROW, **change), table.allowed(ROW))  # type: ignore[arg-type]
    assert found.startswith(said)


def test_a_kernel_without_a_budget_is_told() -> None:
    assert table.excess(ROW, None) == ["no budget; write one with --write-budget"]


def test_budgets_are_read_as_they_were_written(tmp_path: Path) -> None:
    budgets = [table.allowed(ROW), table.allowed(replace(ROW, kernel="backward", wide_loads=0))]
    table.write_budgets(tmp_path / "budget.csv", budgets)
    assert list(table.read_budgets(tmp_path / "budget.csv").values()) == [budgets[1], budgets[0]]
    assert table.read_budgets(tmp_path / "none.csv") == {}


def test_the_table_has_a_header_and_a_line_a_row() -> None:
    header, line = table.lines([ROW])
    assert header.split()[:4] == ["op", "sample", "kernel", "tile"]
    assert " ".join(line.split()) == "squash rows forward ROWS=8 float32 sm_90 41 0 1024 75 4 8 2"


@compiles
@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize("op", ["squash", "predict_votes", "dynamic_routing", "dense_capsules"])
def test_kernels_compile_within_their_budgets(op: str, target: str) -> None:
    from caps_kernels.inspect import ahead

    sample = ahead.samples(op)[0].name
    rows = command.inspect("triton", [op], [sample], ["bfloat16"], [target], 1)
    assert command.judge(rows, "triton") == 0
    assert all(row.wide_loads for row in rows if "sum" not in row.kernel and row.kernel != "finish")
    if op in ("predict_votes", "dense_capsules"):
        assert all(row.matrix for row in rows if "sum" not in row.kernel and row.kernel != "begin_backward")


@compiles
def test_a_breach_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(table, "read_budgets", lambda path: {})
    arguments = ["--backend", "triton", "--op", "squash", "--target", "sm_90", "--dtype", "float32", "--jobs", "1"]
    assert command.main([*arguments, "--sample", "primary capsules"]) == 1
    out = capsys.readouterr()
    assert "2 breaches of budgets" in out.out
    assert "forward_whole for primary capsules, float32, sm_90: no budget" in out.err


def test_help_says_what_the_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    words = ("occupancy", "128 bits", "triton_budget.csv", "cuda_budget.csv", "--backend", "--counts", "examples:")
    assert all(word in text for word in words)

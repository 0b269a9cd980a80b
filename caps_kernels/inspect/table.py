"""The one table of compiled kernels: its rows, how they print, and the budgets they are held to."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import caps_kernels

HEADERS = {
    "op": "op",
    "sample": "sample",
    "kernel": "kernel",
    "tile": "tile",
    "dtype": "dtype",
    "target": "target",
    "registers": "regs",
    "stack": "stack",
    "shared": "shared",
    "occupancy": "occ %",
    "wide_loads": "128-bit",
    "loads": "loads",
    "matrix": "mma",
}
"""The columns that print, and what stands above them."""


Key = tuple[str, str, str, str]
"""Sample, kernel, dtype and target."""


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one target."""

    op: str
    sample: str
    """The call for which it was compiled."""
    kernel: str
    tile: str
    dtype: str
    target: str
    """"sm_90", "gfx942"."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread's stack, with what was spilled there."""
    shared: int
    """Bytes of a program's shared memory."""
    occupancy: int
    """Percent of the warps that the hardware holds at most, by registers, shared memory and number of programs."""
    wide_loads: int
    """Loads of 128 bits from global memory."""
    loads: int
    """All loads from global memory."""
    matrix: int
    """Instructions of the matrix units."""

    @property
    def key(self) -> Key:
        """What identifies the kernel in a budget."""
        return self.sample, self.kernel, self.dtype, self.target


@dataclass(frozen=True)
class Budget:
    """What a kernel may use, and what it must contain."""

    sample: str
    kernel: str
    dtype: str
    target: str
    registers: int
    shared: int
    occupancy: int
    wide_loads: bool
    """It must load 128 bits at a time somewhere."""
    matrix: bool
    """It must use the matrix units."""

    @property
    def key(self) -> Key:
        """As `Row.key`."""
        return self.sample, self.kernel, self.dtype, self.target


def budget_path(op: str, backend: str = "triton") -> Path:
    """The budget of an op, beside its kernels."""
    return Path(caps_kernels.__file__).parent / "ops" / op / f"{backend}_budget.csv"


def allowed(row: Row) -> Budget:
    """The budget that a row just keeps: registers are handed out eight at a time."""
    sample, kernel, dtype, target = row.key
    return Budget(
        sample,
        kernel,
        dtype,
        target,
        registers=-(-row.registers // 8) * 8,
        shared=row.shared,
        occupancy=row.occupancy,
        wide_loads=row.wide_loads > 0,
        matrix=row.matrix > 0,
    )


def excess(row: Row, budget: Budget | None) -> list[str]:
    """How a row breaks its budget, in words; nothing where it keeps it."""
    said = [] if row.stack == 0 else [f"{row.stack} bytes of stack (spills)"]
    if budget is None:
        return [*said, "no budget; write one with --write-budget"]
    if row.registers > budget.registers:
        said.append(f"{row.registers} registers > {budget.registers}")
    if row.shared > budget.shared:
        said.append(f"{row.shared} bytes of shared memory > {budget.shared}")
    if row.occupancy < budget.occupancy:
        said.append(f"occupancy {row.occupancy} % < {budget.occupancy} %")
    if budget.wide_loads and not row.wide_loads:
        said.append("no 128-bit loads")
    if budget.matrix and not row.matrix:
        said.append("no instructions of the matrix units")
    return said


def read_budgets(path: Path) -> dict[Key, Budget]:
    """Budgets by key; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        found = [_parse(line) for line in csv.DictReader(file)]
    return {budget.key: budget for budget in found}


def _parse(line: dict[str, str]) -> Budget:
    numbers = {name: int(line[name]) for name in ("registers", "shared", "occupancy")}
    flags = {name: line[name] == "True" for name in ("wide_loads", "matrix")}
    names = {name: line[name] for name in ("sample", "kernel", "dtype", "target")}
    return Budget(**names, **numbers, **flags)  # type: ignore[arg-type]


def write_budgets(path: Path, budgets: Iterable[Budget]) -> None:
    """Write budgets, sorted."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Budget)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(budget) for budget in sorted(budgets, key=lambda b: b.key))


def lines(rows: Sequence[Row]) -> list[str]:
    """The table's lines, its header first; numbers stand at the right of their columns."""
    cells = [list(HEADERS.values()), *([str(getattr(row, name)) for name in HEADERS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [f.type == "int" for f in fields(Row)]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")

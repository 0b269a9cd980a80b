"""`python -m caps_kernels.inspect`: compile every GPU kernel ahead of time, and hold it to its budget; or count."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from caps_kernels import backends
from caps_kernels.inspect import table
from caps_kernels.inspect.table import Row

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
EVERYWHERE = ("float32", "bfloat16")
"""Compiled for every sample and target; the other dtypes for the first sample on sm_90, unless they are asked for."""

DESCRIPTION = """\
Compile every Triton kernel ahead of time, with every tile it uses, for NVIDIA's A100 (sm_80), H100 (sm_90) and B200
(sm_100) and AMD's MI300 (gfx942). No GPU is needed; NVIDIA's assembler and disassembler come with Triton.

Each row is one kernel as a call named by the op (its SAMPLES) would launch it: registers of a thread; bytes of its
stack, where spilled registers go; bytes of shared memory of a program; occupancy, the share of the warps a
multiprocessor could hold; loads from global memory, and how many of them are of 128 bits; instructions of the matrix
units (HMMA, HGMMA, UTCMMA, MFMA). Budgets lie beside the kernels, caps_kernels/ops/<op>/triton_budget.csv: more
registers or shared memory, less occupancy, a lost kind of instruction, or any spill ends with exit code 1."""

EPILOG = """\
examples:
  python -m caps_kernels.inspect --op squash --target sm_90     one op on one GPU, in seconds
  python -m caps_kernels.inspect                                everything, on all cores: minutes
  python -m caps_kernels.inspect --op squash --write-budget     after a change that is meant to use more
  python -m caps_kernels.inspect --counts                       launches and bytes of each call instead"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m caps_kernels.inspect",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--op", action="append", default=[], choices=triton_ops(), help="only this op (repeatable)")
    made.add_argument("--target", action="append", default=[], choices=TARGETS, help="only this GPU (repeatable)")
    made.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="only this dtype (repeatable)")
    made.add_argument("--sample", action="append", default=[], help="only the sample of this name (repeatable)")
    made.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: %(default)s)")
    made.add_argument("--write-budget", action="store_true", help="take what is found as the budget")
    made.add_argument(
        "--counts",
        action="store_true",
        help="print launches, bytes and FLOP of each sample's call by the op's formula, the least time they take on "
        "A100, H100 and B200, and what eager PyTorch moves; and hold the formulas to what Triton's interpreter counts",
    )
    return made


def triton_ops() -> list[str]:
    """The ops that have Triton kernels."""
    return [op for op in backends.ops() if (op, "triton") in backends._IMPLEMENTATIONS]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    options = parser().parse_args(argv)
    if backends.BACKENDS["triton"].missing() is not None:
        print(backends.BACKENDS["triton"].missing(), file=sys.stderr)
        return 2
    # Triton decides between compiler and interpreter when it is imported, in this process or another.
    if options.counts != backends.TRITON_INTERPRETS:
        environment = {**os.environ, "TRITON_INTERPRET": "1" if options.counts else "0"}
        command = [sys.executable, "-m", "caps_kernels.inspect", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=environment, check=False).returncode
    ops = options.op or triton_ops()
    if options.counts:
        from caps_kernels.inspect import counts_table

        return counts_table.show(ops, [DTYPES[name] for name in options.dtype or ["float32"]])
    rows = compile_all(ops, options.sample, options.dtype, options.target, options.jobs)
    print("\n".join(table.lines(rows)))
    if options.write_budget:
        write(rows)
        return 0
    return judge(rows)


def compile_all(
    ops: Sequence[str], samples: Sequence[str], dtypes: Sequence[str], targets: Sequence[str], jobs: int
) -> list[Row]:
    """Compile in several processes, with a progress bar; empty filters stand for everything."""
    from caps_kernels.inspect import ahead

    tasks = [
        (op, sample.name, dtype, target)
        for op in ops
        for number, sample in enumerate(ahead.samples(op))
        for dtype in dtypes or DTYPES
        for target in targets or TARGETS
        if (not samples or sample.name in samples)
        and (dtypes or dtype in EVERYWHERE or (number == 0 and target == "sm_90"))
    ]
    if jobs == 1:
        found = {task: compile_one(task) for task in tqdm(tasks, "compiling", leave=False)}
    else:
        with ProcessPoolExecutor(jobs) as pool:
            futures = {pool.submit(compile_one, task): task for task in tasks}
            done = tqdm(as_completed(futures), "compiling", len(tasks), leave=False)
            found = {futures[future]: future.result() for future in done}
    return [row for task in tasks for row in found[task]]


def compile_one(task: tuple[str, str, str, str]) -> list[Row]:
    """The rows of one op, sample, dtype and target."""
    from caps_kernels.inspect import ahead

    torch.set_num_threads(1)
    op, name, dtype, target = task
    sample = next(sample for sample in ahead.samples(op) if sample.name == name)
    return list(ahead.rows(op, sample, DTYPES[dtype], target))


def judge(rows: Sequence[Row]) -> int:
    """Print which rows break their budgets; 1 where some do, else 0."""
    broken = 0
    for op in dict.fromkeys(row.op for row in rows):
        budgets = table.read_budgets(table.budget_path(op))
        for row in rows:
            if row.op != op:
                continue
            for what in table.excess(row, budgets.get(row.key)):
                broken += 1
                print(f"{op}: {row.kernel} for {row.sample}, {row.dtype}, {row.target}: {what}", file=sys.stderr)
    print(f"\n{len(rows)} kernels, {broken} breaches of budgets")
    return 1 if broken else 0


def write(rows: Sequence[Row]) -> None:
    """Make rows their own budgets, and keep those of kernels that were not compiled."""
    for op in dict.fromkeys(row.op for row in rows):
        path = table.budget_path(op)
        budgets = table.read_budgets(path)
        budgets.update({row.key: table.allowed(row) for row in rows if row.op == op})
        table.write_budgets(path, budgets.values())
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

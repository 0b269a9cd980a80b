"""`python -m caps_kernels.inspect`: what compilers make of every GPU kernel, held to its budget; or count."""

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
from caps_kernels.inspect import built, table
from caps_kernels.inspect.gpus import GPUS
from caps_kernels.inspect.table import Row

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

DESCRIPTION = """\
Read what compilers make of the GPU kernels. No GPU is needed.

triton: every kernel is compiled ahead of time, with every tile and in every dtype, for NVIDIA's A100 (sm_80), H100
(sm_90) and B200 (sm_100) and AMD's MI300 (gfx942); NVIDIA's assembler and disassembler come with Triton. Each row is
one kernel as a call named by the op (its SAMPLES) would launch it.
cuda: every kernel in the library that setup.py built, for the GPUs it was built for, read with the cuobjdump and the
nvdisasm of the CUDA toolkit, or else Triton's. Each row is one kernel with the threads of its launch bounds, and the
dynamic shared memory of a call with J, D and E as the row says and B=128 I=1152 R=3; of the tiles of dense_capsules,
with the largest J and E.

Columns: registers of a thread; bytes of its stack, where spilled registers go; bytes of shared memory of a program or
block; occupancy, the share of the warps a multiprocessor could hold; loads from global memory (LDG, LDGSTS), and how
many of them are of 128 bits; instructions of the matrix units (HMMA, HGMMA, UTCMMA, MFMA). Budgets lie beside the
kernels, caps_kernels/ops/<op>/triton_budget.csv and cuda_budget.csv: more registers or shared memory, less occupancy, a
lost kind of instruction, or any stack ends with exit code 1."""

EPILOG = """\
examples:
  python -m caps_kernels.inspect --op squash --target sm_90     one op on one GPU, in seconds
  python -m caps_kernels.inspect --backend cuda                 the kernels of the built library: a minute
  python -m caps_kernels.inspect                                everything, on all cores: minutes
  python -m caps_kernels.inspect --op squash --write-budget     after a change that is meant to use more
  python -m caps_kernels.inspect --counts                       launches and bytes of each call instead"""

Task = tuple[str, str, str, str, str]
"""Backend, op, and for Triton a sample and a dtype; target."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m caps_kernels.inspect",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--backend", choices=("triton", "cuda"), help="only this backend (default: both that are there)")
    made.add_argument("--op", action="append", default=[], choices=backends.ops(), help="only this op (repeatable)")
    made.add_argument("--target", action="append", default=[], choices=GPUS, help="only this GPU (repeatable)")
    made.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="only this dtype (repeatable)")
    made.add_argument("--sample", action="append", default=[], help="only the sample of this name (repeatable)")
    made.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: %(default)s)")
    made.add_argument("--write-budget", action="store_true", help="take what is found as the budget")
    made.add_argument(
        "--counts",
        action="store_true",
        help="print launches, bytes and FLOP of each sample's call by the op's formula in Triton, the least time they "
        "take on A100, H100 and B200, and what eager PyTorch moves; and hold the formulas to what Triton's interpreter "
        "counts",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    options = parser().parse_args(argv)
    absent = {"triton": backends.BACKENDS["triton"].missing(), "cuda": built.missing()}
    wanted = ["triton"] if options.counts else [options.backend] if options.backend else list(absent)
    for backend in wanted:
        if absent[backend] is not None:
            print(f"{backend}: {absent[backend]}", file=sys.stderr)
    found = [backend for backend in wanted if absent[backend] is None]
    if not found:
        return 2
    # Triton decides between compiler and interpreter when it is imported, in this process or another.
    if "triton" in found and options.counts != backends.TRITON_INTERPRETS:
        environment = {**os.environ, "TRITON_INTERPRET": "1" if options.counts else "0"}
        command = [sys.executable, "-m", "caps_kernels.inspect", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=environment, check=False).returncode
    ops = options.op or backends.ops()
    if options.counts:
        from caps_kernels.inspect import counts_table

        return counts_table.show(ops, [DTYPES[name] for name in options.dtype or ["float32"]])
    breaches = 0
    for backend in found:
        rows = inspect(backend, ops, options.sample, options.dtype, options.target, options.jobs)
        print("\n".join(table.lines(rows)))
        if options.write_budget:
            write(rows, backend)
        else:
            breaches += judge(rows, backend)
    return 1 if breaches else 0


def inspect(
    backend: str,
    ops: Sequence[str],
    samples: Sequence[str],
    dtypes: Sequence[str],
    targets: Sequence[str],
    jobs: int,
) -> list[Row]:
    """The rows of a backend, made in several processes, with a progress bar; empty filters stand for everything."""
    tasks = triton_tasks(ops, samples, dtypes, targets) if backend == "triton" else cuda_tasks(ops, targets)
    if jobs == 1:
        found = {task: inspect_one(task) for task in tqdm(tasks, backend, leave=False, disable=None)}
    else:
        with ProcessPoolExecutor(jobs) as pool:
            futures = {pool.submit(inspect_one, task): task for task in tasks}
            done = tqdm(as_completed(futures), backend, len(tasks), leave=False, disable=None)
            found = {futures[future]: future.result() for future in done}
    rows = [row for task in tasks for row in found[task]]
    return [row for row in rows if (not samples or row.sample in samples) and (not dtypes or row.dtype in dtypes)]


def triton_tasks(
    ops: Sequence[str], samples: Sequence[str], dtypes: Sequence[str], targets: Sequence[str]
) -> list[Task]:
    """What there is to compile ahead of time."""
    from caps_kernels.inspect import ahead

    return [
        ("triton", op, sample.name, dtype, target)
        for op in ops
        for sample in ahead.samples(op)
        for dtype in dtypes or DTYPES
        for target in targets or GPUS
        if not samples or sample.name in samples
    ]


def cuda_tasks(ops: Sequence[str], targets: Sequence[str]) -> list[Task]:
    """What there is to read of the library."""
    return [
        ("cuda", op, "", "", target) for op in ops for target in built.targets() if not targets or target in targets
    ]


def inspect_one(task: Task) -> list[Row]:
    """The rows of a task."""
    backend, op, name, dtype, target = task
    if backend == "cuda":
        return built.rows(op, target)
    from caps_kernels.inspect import ahead

    torch.set_num_threads(1)
    sample = next(sample for sample in ahead.samples(op) if sample.name == name)
    return list(ahead.rows(op, sample, DTYPES[dtype], target))


def judge(rows: Sequence[Row], backend: str) -> int:
    """Print which rows of a backend break their budgets; how many breaches there are."""
    broken = 0
    for op in dict.fromkeys(row.op for row in rows):
        budgets = table.read_budgets(table.budget_path(op, backend))
        for row in rows:
            if row.op != op:
                continue
            for what in table.excess(row, budgets.get(row.key)):
                broken += 1
                print(f"{op}: {row.kernel} for {row.sample}, {row.dtype}, {row.target}: {what}", file=sys.stderr)
    print(f"\n{backend}: {len(rows)} kernels, {broken} breaches of budgets")
    return broken


def write(rows: Sequence[Row], backend: str) -> None:
    """Make rows of a backend their own budgets, and keep those of kernels that were not among them."""
    for op in dict.fromkeys(row.op for row in rows):
        path = table.budget_path(op, backend)
        budgets = table.read_budgets(path)
        budgets.update({row.key: table.allowed(row) for row in rows if row.op == op})
        table.write_budgets(path, budgets.values())
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

"""`python -m caps_kernels.inspect --counts`: what calls launch and move, by formulas, which are checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from caps_kernels._triton import Count, Sample
from caps_kernels.inspect import ahead, counts, interpreter
from caps_kernels.inspect.table import dtype_name


def show(ops: Sequence[str], dtypes: Sequence[torch.dtype]) -> int:
    """Print both tables for some ops; 1 where a formula is wrong, else 0."""
    print(f"{'':<60}{'launches':>9}{'MB':>9}{'MFLOP':>9}{'least µs on':>12} {' / '.join(counts.GPUS)}   eager PyTorch")
    for op in ops:
        for sample in ahead.samples(op):
            for dtype in dtypes:
                _print_sample(op, sample, dtype)
    interpreter.quicken()
    print("\nThe formulas against what Triton's interpreter loads, stores and launches, for small calls:")
    wrong = 0
    for op in ops:
        for sample in tqdm(small_samples(op), op, leave=False, disable=None):
            for dtype in (torch.float32, torch.bfloat16):
                wrong += _compare(op, sample, dtype)
    print(f"{wrong} differences")
    return 1 if wrong else 0


def small_samples(op: str) -> list[Sample]:
    """Calls small enough for the interpreter that the formulas of an op cover."""
    found: list[Sample] = ahead.module(op).COUNTED
    return found


def differences(op: str, sample: Sample, dtype: torch.dtype) -> list[str]:
    """Where an op's formulas differ from what the interpreter counts, in words."""
    by_formula = counts.formulas(op, sample, dtype)
    pairs = zip(("forward", "backward"), by_formula, counts.interpreted(op, sample, dtype), strict=True)
    return [
        f"{direction} {name}: formula {getattr(want, name)}, counted {getattr(got, name)}"
        for direction, want, got in pairs
        for name in ("launches", "read", "written")
        if getattr(want, name) != getattr(got, name)
    ]


def _compare(op: str, sample: Sample, dtype: torch.dtype) -> int:
    said = differences(op, sample, dtype)
    tqdm.write(f"{op}, {sample.name}, {dtype_name(dtype)}: {'; '.join(said) or 'equal'}")
    return len(said)


def _print_sample(op: str, sample: Sample, dtype: torch.dtype) -> None:
    found = counts.formulas(op, sample, dtype)
    for direction, count, eager in zip(("forward", "backward"), found, counts.eager(op, sample, dtype), strict=True):
        name = f"{op}, {sample.name}, {dtype_name(dtype)}, {direction}"
        print(f"{name:<60}{_numbers(count, dtype)}   {_numbers(eager, dtype)}")


def _numbers(count: Count, dtype: torch.dtype) -> str:
    times = " / ".join(f"{1e6 * counts.seconds(count, dtype, gpu):.0f}" for gpu in counts.GPUS)
    return f"{count.launches:>9}{count.bytes / 1e6:>9.1f}{count.flop / 1e6:>9.0f}  {times:>18}"

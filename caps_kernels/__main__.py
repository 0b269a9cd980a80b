"""`python -m caps_kernels`: what can run on this machine, and why the rest cannot."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import caps_kernels
from caps_kernels import _selfcheck, backends


def main() -> int:
    """Print the table; with --check, run every op on every backend. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m caps_kernels",
        description="Show which backend can run which op on this machine, and why the others cannot.",
        epilog="Choose a backend with backend=..., with caps_kernels.backends.use(...), or with "
        f"{backends.ENVIRONMENT_VARIABLE}; what a given call would use: caps_kernels.backends.explain(op, *args).",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run each op, forward and backward, on each backend that can and compare with the reference in float64; "
        "exits with 1 if one differs",
    )
    check = parser.parse_args().check
    print(f"caps_kernels {caps_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads; {_gpu()}\n")
    reasons = {op: {name: backends.lacking(op, name) for name in backends.BACKENDS} for op in backends.ops()}
    failures = _print_table(reasons, check)
    print()
    for name, backend in backends.BACKENDS.items():
        lacking = [reasons[op][name] for op in reasons]
        text = "; ".join(dict.fromkeys(filter(None, lacking))) or "runs"
        print(f"{name:<10} {backend.summary}: {text}")
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


def _print_table(reasons: dict[str, dict[str, str | None]], check: bool) -> list[str]:
    """Print one row an op, one column a backend; the failures of the checks."""
    failures = []
    print("".join([f"{'op':<16}", *(f"{name:<24}" for name in backends.BACKENDS)]).rstrip())
    for op, row in reasons.items():
        cells = []
        for name, reason in row.items():
            if reason is not None:
                cells.append("-")
            elif not check:
                cells.append("runs")
            else:
                result = _selfcheck.check(op, name)
                cells.append(str(result))
                if not result.passed:
                    failures.append(f"{op} on {name}: {result.detail}")
        print("".join([f"{op:<16}", *(f"{cell:<24}" for cell in cells)]).rstrip())
    return failures


def _gpu() -> str:
    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    return "no CUDA device"


if __name__ == "__main__":
    sys.exit(main())

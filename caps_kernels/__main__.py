"""`python -m caps_kernels`: what can run on this machine, and why the rest cannot."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import caps_kernels
from caps_kernels import _selfcheck, _trust, backends


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
        "on a GPU in a process of its own, whose result is kept; exits with 1 if one differs",
    )
    check = parser.parse_args().check
    print(f"caps_kernels {caps_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads; {_gpu()}\n")
    reasons = {op: {name: backends.lacking(op, name) for name in backends.BACKENDS} for op in backends.ops()}
    cells = {(op, name): "runs" if row[name] is None else "-" for op, row in reasons.items() for name in row}
    failures = _check(cells) if check else []
    print("".join([f"{'op':<18}", *(f"{name:<24}" for name in backends.BACKENDS)]).rstrip())
    for op in reasons:
        print("".join([f"{op:<18}", *(f"{cells[op, name]:<24}" for name in backends.BACKENDS)]).rstrip())
    print()
    for name, backend in backends.BACKENDS.items():
        lacking = [reasons[op][name] for op in reasons]
        texts = list(dict.fromkeys(filter(None, lacking)))
        if None in lacking and (not texts or backend.on_trial):
            texts.append(_state(name))
        print(f"{name:<10} {backend.summary}: {'; '.join(texts)}")
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


def _check(cells: dict[tuple[str, str], str]) -> list[str]:
    """Check every op on every backend that runs it, and put the results into the cells; the failures."""
    failures = []
    for name in backends.BACKENDS:
        ops = [op for op in backends.ops() if cells[op, name] == "runs"]
        device = _trial_device(name)
        if device is not None and ops:
            trial = _trust.trial(name, *device, again=True)
            cells.update({(op, name): trial.ops.get(op, "not checked") for op in ops})
            failures += [f"{name}: {trial.reason}"] if trial.reason is not None else []
            continue
        for op in ops:
            result = _selfcheck.check(op, name)
            cells[op, name] = str(result)
            failures += [] if result.passed else [f"{op} on {name}: {result.detail}"]
    return failures


def _trial_device(name: str) -> tuple[str, int | None] | None:
    """The device on which a backend must pass its self-check before it is taken unasked; None where it need not."""
    if backends.BACKENDS[name].on_trial:
        for device, preferred in backends.PREFERENCE.items():
            if name in preferred and device != "cuda":
                return device, None
            if name in preferred and torch.cuda.is_available():
                return device, torch.cuda.current_device()
    return None


def _state(name: str) -> str:
    """What to say of a backend that lacks nothing."""
    device = _trial_device(name)
    if device is None:
        return "runs"
    trial = _trust.known(name, *device)
    if trial is None:
        return "runs; its self-check on this device comes with its first use"
    return "runs; it passed its self-check" if trial.reason is None else f"runs only when asked for: {trial.reason}"


def _gpu() -> str:
    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    return "no CUDA device"


if __name__ == "__main__":
    sys.exit(main())

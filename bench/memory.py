"""Peak memory of one call, in a fresh process: `python -m bench.memory main einsum both` prints it.

On a GPU it is what torch's allocator held at most, above the inputs. On a CPU:

The process makes the inputs, calls once at a tiny size (which loads libraries and starts threads), has the system
start its record of peak memory anew, and calls. What is reported is the record less what was resident before, so
results and gradients count and inputs do not. The heap is glibc's default one, which gives freed memory back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import machine
from bench.cases import Case, named
from bench.contenders import Contender, Limits, build


def in_fresh_process(case: Case, contender: str, quantity: str, threads: int, *, timeout: float = 300) -> int | str:
    """Bytes at the peak of one call above its inputs, or why there is no number.

    Args:
        case: one of `bench.cases.CASES`.
        contender: such as "cpp" or "einsum".
        quantity: "forward" (under no_grad) or "both".
        threads: of torch.
        timeout: seconds for the process.
    """
    command = [sys.executable, "-m", "bench.memory", case.name, contender, quantity, "--threads", str(threads)]
    environment = machine.environment(warm=False)
    try:
        done = subprocess.run(
            command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"over {timeout:.0f} s"
    if done.returncode:
        return "failed: " + (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    result: int | str = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def median_of_processes(case: Case, contender: str, quantity: str, threads: int, processes: int) -> int | str:
    """The median of `in_fresh_process` over an odd number of processes, or why there is none.

    That of einsum at the main shape was 118 to 148 million bytes in twelve processes.
    """
    found = [in_fresh_process(case, contender, quantity, threads) for _ in range(processes)]
    for number in found:
        if isinstance(number, str):
            return number
    return statistics.median_low([number for number in found if isinstance(number, int)])


def peak(case: Case, contender: str, quantity: str, device: str = "cpu") -> int | str:
    """The same in this process, which should be fresh."""
    _call(_find(case.tiny(), contender, device), quantity, case.tiny(), device)
    found = _find(case, contender, device)
    if isinstance(found, str):
        return found
    if quantity in found.refused:
        return found.refused[quantity]
    if contender.startswith("compile"):
        # Compiling takes more memory than calling, and is bound to the sizes.
        _call(found, quantity, case, device)
    grad_output = case.grad_output(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _call(found, quantity, case, device, grad_output)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    if not machine.reset_peak():
        return "unknown: this system keeps no record of peak memory that can be reset"
    before = machine.resident()
    _call(found, quantity, case, device, grad_output)
    return machine.peak_resident() - before


def _find(case: Case, name: str, device: str) -> Contender | str:
    inputs, limits = case.inputs(device), Limits.here(device=device)
    if not name.startswith("compile"):
        # Choosing a layout of W makes calls; memory does not depend on it.
        present, absent = build(case, inputs, limits, compiled=False, only=[name], choose_layout=False)
    else:
        present, absent = build(case, inputs, limits, only=[name], choose_layout=False)
    if not present:
        return absent[0].reason if absent else f"there is no {name!r} in this case"
    return present[0]


def _call(
    contender: Contender | str, quantity: str, case: Case, device: str, grad_output: torch.Tensor | None = None
) -> None:
    if isinstance(contender, str):
        return
    with contender.around():
        if quantity == "forward":
            with torch.no_grad():
                contender.function()
            return
        contender.gradients(contender.function(), case.grad_output(device) if grad_output is None else grad_output)


def main() -> None:
    """Print the peak of one call, in bytes, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("case", help="a name of `python bench/run.py --list`")
    parser.add_argument("contender", help="such as cpp, reference, einsum, 'compile einsum'")
    parser.add_argument("quantity", choices=("forward", "both"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        case = named(given.case)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(peak(case, given.contender, given.quantity, "cuda" if torch.cuda.is_available() else "cpu")))


if __name__ == "__main__":
    main()

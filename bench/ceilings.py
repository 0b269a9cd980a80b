"""What the machine can do at most, measured in the same run: no share means anything without."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

# Twelve independent chains hide the latency of a fused multiply-add at two a cycle, and with the two operands they fit
# into sixteen registers.
_SOURCE = r"""
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
typedef float vec __attribute__((vector_size(WIDTH * 4)));
extern "C" double fma_loop(long rounds, float factor, float addend) {
    vec a, b, x[12];
    for (int k = 0; k < WIDTH; ++k) { a[k] = factor; b[k] = addend; }
    for (int c = 0; c < 12; ++c) for (int k = 0; k < WIDTH; ++k) x[c][k] = c + k;
    for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int c = 0; c < 12; ++c) x[c] = x[c] * a + b;
    }
    double sum = 0;
    for (int c = 0; c < 12; ++c) for (int k = 0; k < WIDTH; ++k) sum += x[c][k];
    return sum;
}
extern "C" int fma_width() { return WIDTH; }
"""


IDLE_LIMIT = 3
"""Of `Ceilings.idle`: caches that others have filled cost less than twice the time."""


@dataclass(frozen=True)
class Ceilings:
    """Rates of this machine in 10⁹ a second."""

    fma: float
    """FLOP/s of the arithmetic units, all threads: the peak that shares refer to."""
    fma_one_thread: float
    fma_method: str
    """How `fma` was measured."""
    sgemm: float
    """FLOP/s of torch's float32 matrix product, all threads."""
    copy: float
    """Bytes/s read plus written by copying a large tensor."""
    idle: float = 1.0
    """How many times longer one thread takes to read 16 MiB that nobody touched for a tenth of a second."""

    def highest(self, other: Ceilings) -> Ceilings:
        """The higher of each rate, for two measurements of one machine: a neighbour only ever lowers them."""
        rates = ("fma", "fma_one_thread", "sgemm", "copy")
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in rates})

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"FMA peak        {self.fma:7.0f} GFLOP/s, one thread {self.fma_one_thread:.0f} ({self.fma_method})",
            f"matrix product  {self.sgemm:7.0f} GFLOP/s (torch, float32, 2048 x 2048)",
            f"copy            {self.copy:7.1f} GB/s (read + written, 256 MiB)",
            f"idle memory     {self.idle:7.1f} x the time to read it (16 MiB after 0.1 s without use)",
        ]

    def warnings(self) -> list[str]:
        """What makes times on this machine mean less than they say."""
        if self.idle < IDLE_LIMIT:
            return []
        return [
            f"Memory that was left alone for 0.1 s takes {self.idle:.0f} times as long to read on this machine, as on "
            "some virtual ones. Between two turns everyone's memory is left alone for longer, so times and shares show "
            "this more than anything else."
        ]


def measure(threads: int, device: str = "cpu") -> Ceilings:
    """Measure them; takes about two seconds.

    Args:
        threads: of the arithmetic loop; torch's own number is not changed.
        device: "cpu" or "cuda", where the peak is that of torch's matrix product.
    """
    sgemm, copy = _sgemm(device), _copy(device)
    if device == "cuda":
        return Ceilings(sgemm, sgemm, "torch's float32 matrix product on the GPU", sgemm, copy)
    loop, idle = _fma_loop(), _with_threads(1, _idle)
    if loop is None:
        one = _with_threads(1, lambda: _sgemm(device))
        return Ceilings(sgemm, one, "torch's float32 matrix product: no C++ compiler here", sgemm, copy, idle)
    rates = {n: max(loop(n) for _ in range(5)) for n in {1, threads}}
    return Ceilings(
        rates[threads], rates[1], "a loop of 12 multiply-adds, compiled for this processor", sgemm, copy, idle
    )


def _with_threads(threads: int, run: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    run()
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _sgemm(device: str) -> float:
    size = 2048
    a, b, out = (torch.ones(size, size, device=device) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device) / 1e9


def _copy(device: str) -> float:
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _best(lambda: target.copy_(source), device) / 1e9


def _idle() -> float:
    data = torch.ones(2**22)

    def seconds(pause: float) -> float:
        time.sleep(pause)
        began = time.perf_counter()
        data.sum()
        return time.perf_counter() - began

    seconds(0)
    return statistics.median(seconds(0.1) for _ in range(5)) / statistics.median(seconds(0) for _ in range(5))


def _fma_loop() -> Callable[[int], float] | None:
    """A function from threads to GFLOP/s, or None where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="caps_bench_") as folder:
        source, library = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(_SOURCE, encoding="ascii")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        try:
            command = [compiler, *flags, str(source), "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loaded = ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):
            return None
    run = loaded.fma_loop
    run.argtypes, run.restype = [ctypes.c_long, ctypes.c_float, ctypes.c_float], ctypes.c_double
    flop = 2 * 12 * int(loaded.fma_width())

    def rate(threads: int) -> float:
        rounds = 5_000_000
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
            list(pool.map(lambda _: run(1000, 0.999, 0.001), range(threads)))
            began = time.perf_counter()
            list(pool.map(lambda _: run(rounds, 0.999, 0.001), range(threads)))
            return threads * rounds * flop / (time.perf_counter() - began) / 1e9

    return rate

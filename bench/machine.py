"""What a run was made on, and the state of its heap."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

import caps_kernels as ck

ROOT = Path(__file__).resolve().parent.parent
WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
"""Has glibc keep freed memory instead of giving it back: with its defaults every large tensor of eager PyTorch is paid
for in page faults, which makes the baselines up to three times slower than they are."""


def heap() -> str:
    """Say "warm" where this process was started with `WARM_HEAP`, else "default"."""
    return "warm" if all(os.environ.get(name) == value for name, value in WARM_HEAP.items()) else "default"


def environment(*, warm: bool) -> dict[str, str]:
    """The environment of a child process with a warm or a default heap."""
    others = {name: value for name, value in os.environ.items() if name not in WARM_HEAP}
    return {**others, **WARM_HEAP} if warm else others


def restart_with_warm_heap(script: Path) -> NoReturn:
    """Replace this process by one that runs `script` with the same arguments and a warm heap."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, str(script), *sys.argv[1:]], environment(warm=True))


def available_memory(device: str = "cpu") -> float:
    """Bytes that can be had without swapping (infinite where the system does not say); of "cuda", free on the GPU."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return _proc_bytes("/proc/meminfo", "MemAvailable") or float("inf")


def _proc_bytes(path: str, field: str) -> int:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 if values else 0


def resident() -> int:
    """Bytes of memory this process holds now (Linux, else 0)."""
    return _proc_bytes("/proc/self/status", "VmRSS")


def give_memory_back() -> None:
    """Return what the warm heap holds free to the system (glibc, else nothing): other processes need it too."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_resident() -> int:
    """The most it ever held (Linux, else 0)."""
    return _proc_bytes("/proc/self/status", "VmHWM")


def reset_peak() -> bool:
    """Have `peak_resident` start anew; whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def describe(device: str) -> dict[str, str]:
    """Processor or GPU, versions, commit: what a number means nothing without."""
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "caps_kernels": ck.__version__,
        "commit": commit(),
        "heap": heap(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
    }


def commit() -> str:
    """The commit of this tree, with a + where files differ from it."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        return name
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([name, *known])

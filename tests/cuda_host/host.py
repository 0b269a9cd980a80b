"""Compiles a source of csrc/cuda for the host, loads it, and runs its ops on CPU tensors with the threads of a GPU as
fibers.

    python -m tests.cuda_host.host squash        # builds what tests load, here for one op
    CAPS_CUDA_HOST_SANITIZER=thread python -m tests.cuda_host.host        # and for a sanitizer
    python -m tests.cuda_host.host --under thread -m pytest tests/cuda_host        # runs Python under it

The library's ops are torch.ops.caps_kernels_cuda_host; `as_backend` lets them be backend "cuda", on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from caps_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda_host"
SOURCES = ROOT / "csrc" / "cuda"
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-fsanitize=thread"],
}
FLAGS = [
    *("-std=c++20", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    # Pragmas are nvcc's; packs of numbers are read as uint4, which nvcc allows.
    *("-Wno-unknown-pragmas", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-DCAPS_ON_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
SANITIZER = "CAPS_CUDA_HOST_SANITIZER"
"""The environment variable that says which sanitizer's build `load` takes: none, "address" or "thread"."""


CHANGED = "CAPS_CUDA_HOST_SOURCE_"
"""With an op's name in capitals after it, the environment variable of a changed source that `load` takes instead."""
RUNTIMES = {"": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def can_compile() -> bool:
    """Whether there is a compiler for the host; sanitizers are asked of g++."""
    return shutil.which("g++") is not None


def ops() -> list[str]:
    """The ops that have a source in csrc/cuda."""
    return sorted(path.stem for path in SOURCES.glob("*.cu") if path.stem != "library")


def orders(*settings: dict[str, int]) -> tuple[dict[str, int], ...]:
    """The orders of threads in which a test runs: all of them, or but the last where a sanitizer watches, which judges
    by what barriers order and not by who came first.
    """
    return settings[-1:] if os.environ.get(SANITIZER) else settings


def build(source: Path, sanitizer: str = "") -> Path:
    """Compile a source, a file of csrc/cuda or a changed copy of one, beside which changed headers may lie in a folder
    "caps"; the library, made anew only where it must be.

    Raises:
        RuntimeError: it does not compile.
    """
    headers = [*(ROOT / "csrc" / "include").rglob("*.h"), *Path(__file__).parent.glob("*.[hc]*")]
    headers += source.parent.rglob("*.h")
    torch_folder = Path(torch.__file__).parent
    command = [os.environ.get("CXX", "g++"), *FLAGS, *SANITIZERS[sanitizer], f'-DCAPS_SOURCE="{source}"']
    command += [
        f"-I{source.parent}",
        f"-I{ROOT}/csrc/include",
        f"-I{Path(__file__).parent}",
        f"-isystem{torch_folder}/include",
    ]
    command += [f"-isystem{sysconfig.get_paths()['include']}", str(Path(__file__).with_name("driver.cpp"))]
    state = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in (source, *sorted(headers)):
        state.update(path.read_bytes())
    library = FOLDER / f"{source.stem}-{state.hexdigest()[:16]}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command += ["-o", str(made), f"-L{torch_folder}/lib", "-ltorch_cpu"]
        # The compiler itself does without a sanitizer's runtime.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source} does not compile for the host:\n{done.stderr}")
        made.rename(library)
    return library


def run_sanitized(sanitizer: str, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a sanitizer's runtime, in which libraries built for it can be loaded; its first finding ends it.

    Args:
        sanitizer: "address" (with undefined behaviour), "thread", or "" for none.
        arguments: of Python.
        environment: variables to set.
    """
    paths = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    # Python and torch keep what they allocate once: leaks are not looked for.
    variables = {
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        SANITIZER: sanitizer,
        **environment,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True, check=False
    )


class Host:
    """The loaded library of one op, and the settings of its harness (cuda_host.h: Settings)."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self._setting = ctypes.CDLL(str(library)).cuda_host_setting
        self._setting.restype = ctypes.POINTER(ctypes.c_int)
        self._setting.argtypes = [ctypes.c_char_p]

    def __getitem__(self, name: str) -> int:
        """The value of a setting."""
        return int(self._setting(name.encode()).contents.value)

    def set(self, **values: int) -> None:
        """Change settings."""
        for name, value in values.items():
            self._setting(name.encode()).contents.value = value

    @contextmanager
    def settings(self, **values: int) -> Iterator[None]:
        """Change settings during a block."""
        before = {name: self[name] for name in values}
        self.set(**values)
        try:
            yield
        finally:
            self.set(**before)

    def launches(self) -> int:
        """How many launches there were since this was last asked."""
        count = self["launches"]
        self.set(launches=0)
        return count


@functools.cache
def load(op: str) -> Host:
    """The library of an op, built for the sanitizer of the environment."""
    changed = os.environ.get(CHANGED + op.upper())
    return Host(build(Path(changed) if changed else SOURCES / f"{op}.cu", os.environ.get(SANITIZER, "")))


def as_backend() -> Mapping[str, Host]:
    """Let backend "cuda" run on CPU tensors in this process, by the host's libraries of all ops."""
    hosts = {op: load(op) for op in ops()}
    setattr(torch.ops, "caps_kernels_cuda", torch.ops.caps_kernels_cuda_host)  # noqa: B010, it is no attribute to mypy
    backends.BACKENDS["cuda"] = backends.Backend("cuda", "CUDA C++ on the host, for tests", ("cpu",), lambda: None)
    return hosts


def main(arguments: Sequence[str]) -> int:
    """What the top of this file shows; the exit status."""
    if arguments[:1] == ["--under"]:
        done = run_sanitized(arguments[1], arguments[2:])
        print(done.stdout, done.stderr)
        return done.returncode
    sources = [SOURCES / f"{name}.cu" for name in arguments or ops()]
    with ThreadPoolExecutor(2) as two:
        print(*two.map(lambda source: build(source, os.environ.get(SANITIZER, "")), sources), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

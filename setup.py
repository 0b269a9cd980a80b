"""Builds the compiled backends, and leaves a reason inside the package for each one it does not build.

CAPS_BUILD chooses: auto (the default: whatever this machine can build), cpu, cuda, or none. A backend asked for by name
that cannot be built fails the installation; under auto its reason is kept and the package works without it.
CXX and CXXFLAGS are honoured, and by nvcc its own NVCC_PREPEND_FLAGS and NVCC_CCBIN. TORCH_CUDA_ARCH_LIST is as in
torch, such as "8.6;9.0+PTX". No GPU is needed. An object is compiled again only where its command or a file it includes
has changed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
SOURCES = {"cpp": ("csrc/cpu", "*.cpp"), "cuda": ("csrc/cuda", "*.cu")}
ASKED_BY = {"cpp": "cpu", "cuda": "cuda"}
# Runs on torch 2.11 and Python 3.10, and on all that are newer.
VERSIONS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS = [
    *("-std=c++20", "-O3", *HOST_FLAGS, "-Wno-maybe-uninitialized"),
    # NaN, infinity and the order of sums keep their meaning; errno and floating-point traps are given up.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    # A short loop that begins amid a line of instructions takes up to a seventh longer, by chance of what is before it.
    "-falign-loops=64",
    *VERSIONS,
]
ARCHITECTURES = "8.0;9.0;10.0"
"""A100, H100, B200; what is newer runs from the last one's PTX."""


class Library(NamedTuple):
    """How a backend's library is made: the compile command of each object, the command that links them, and a note."""

    objects: dict[Path, list[str]]
    link: list[str]
    note: str = ""


def why_not(backend: str, choice: str) -> str | None:
    """Why a compiled backend is not to be built, or None."""
    if choice == "none" or (choice != "auto" and ASKED_BY[backend] != choice):
        return f"not built: CAPS_BUILD={choice} when the package was installed"
    folder, pattern = SOURCES[backend]
    if not any((ROOT / folder).glob(pattern)):
        return f"this version has no {'CUDA C++' if backend == 'cuda' else 'C++'} kernels"
    if backend == "cpp" and compiler() is None:
        return "not built: no C++ compiler was found when the package was installed"
    if backend == "cuda" and not shutil.which("nvcc"):
        return "not built: nvcc was not found when the package was installed"
    if backend == "cuda" and torch_cuda() is None:
        return "not built: the torch it was installed with has no CUDA"
    return None


def torch_cuda() -> str | None:
    """The version of CUDA that torch was built with, or None."""
    import torch

    return torch.version.cuda


def compiler() -> str | None:
    """The C++ compiler: CXX where it is set, else the first that is found."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def instruction_sets() -> dict[str, list[str]]:
    """The names for which kernels are compiled, as in csrc/include/caps/kernel.h, and the flags of each."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": []}
    return {
        "v2": ["-march=x86-64-v2"],
        "v3": ["-march=x86-64-v3"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }


def includes() -> list[str]:
    """Where torch's and Python's headers are."""
    import torch

    return [f"{Path(torch.__file__).parent}/include", sysconfig.get_paths()["include"]]


def torch_libraries() -> str:
    """The option that says where torch's libraries are."""
    import torch

    return f"-L{Path(torch.__file__).parent}/lib"


def cpp_library(library: Path, objects: Path) -> Library:
    """Backend "cpp": csrc/library.cpp once, and each op of csrc/cpu for the host and for every instruction set."""
    cxx, flags = str(compiler()), [*FLAGS, *os.environ.get("CXXFLAGS", "").split()]
    host = [f"-isystem{folder}" for folder in includes()]
    units = {"library": ("library", host)}
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        units[source.stem] = (f"cpu/{source.stem}", host)
        for name, march in instruction_sets().items():
            units[f"{source.stem}-{name}"] = (f"cpu/{source.stem}", [f"-DCAPS_ISA={name}", *march])
    commands = {
        objects / f"{name}.o": [cxx, *flags, *extra, f"-I{ROOT}/csrc/include", "-c", f"{ROOT}/csrc/{stem}.cpp"]
        for name, (stem, extra) in units.items()
    }
    link = [cxx, "-shared", *flags, torch_libraries(), *map(str, commands), "-ltorch_cpu", "-o", str(library)]
    return Library(commands, link)


def toolkit() -> Path:
    """The folder of the CUDA toolkit, asked of nvcc, since the nvcc on the PATH may be a script around another."""
    done = subprocess.run(
        [str(shutil.which("nvcc")), "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    top = re.search(r"^#\$ TOP=(.*)$", done.stdout, re.MULTILINE)
    if top is None:
        raise RuntimeError(
            f"nvcc does not say where its toolkit is (exit code {done.returncode}): {done.stdout[-300:]}"
        )
    return Path(top[1].strip()).resolve()


def architectures(nvcc: Path) -> dict[str, list[str]]:
    """The names of the code that nvcc is to make, such as sm_80 and compute_100 (PTX), and the flags of each.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST cannot be understood, or this nvcc knows none of the default architectures.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    wanted = [name for name in asked.split(";") if name]
    if not wanted:
        done = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, text=True, check=True)
        wanted = [name for name in ARCHITECTURES.split(";") if f"sm_{name.replace('.', '')}" in done.stdout.split()]
        if not wanted:
            raise ValueError(f"{nvcc} compiles for none of {ARCHITECTURES}")
        wanted[-1] += "+PTX"
    found = {}
    for name in wanted:
        version = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if version is None:
            raise ValueError(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got {asked!r}')
        number = version[1] + version[2]
        for code in (f"sm_{number}", f"compute_{number}")[: 2 if version[3] else 1]:
            found[code] = ["-gencode", f"arch=compute_{number},code={code}"]
    return found


def cuda_library(library: Path, objects: Path) -> Library:
    """Backend "cuda": every source of csrc/cuda, the kernels in them for each architecture."""
    top = toolkit()
    nvcc, codes = top / "bin" / "nvcc", architectures(top / "bin" / "nvcc")
    listed = " ".join(codes)
    flags = ["-std=c++20", "-O3", "-lineinfo", *VERSIONS, "-DUSE_CUDA", f'-DCAPS_ARCHITECTURES="{listed}"']
    flags += ["-Xcompiler", ",".join(HOST_FLAGS), f"-I{ROOT}/csrc/include"]
    flags += [word for folder in includes() for word in ("-isystem", folder)]
    flags += [flag for options in codes.values() for flag in options]
    commands = {
        objects / f"{source.stem}.o": [str(nvcc), *flags, "-c", str(source)]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    }
    # CUDA's runtime is linked in, so that the library does not depend on the version that torch brings.
    link = [str(nvcc), "-shared", "-cudart", "static", torch_libraries(), *map(str, commands)]
    link += ["-ltorch_cpu", "-ltorch_cuda", "-o", str(library)]
    return Library(commands, link, f"for {', '.join(codes)} with {nvcc}")


def compile_unit(command: Sequence[str], target: Path) -> bool:
    """Run a compile command unless `target` is newer than all it was made of; whether it was run."""
    made_of, stamp = target.with_suffix(".d"), target.with_suffix(".command")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        files = made_of.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        newest = max(os.stat(file).st_mtime for file in files)
        if target.stat().st_mtime > newest and stamp.read_text() == " ".join(command):
            return False
    except OSError:
        pass
    run([*command, "-MMD", "-MF", str(made_of), "-o", str(target)])
    stamp.write_text(" ".join(command))
    return True


def run(command: Sequence[str]) -> None:
    """Run a command; RuntimeError with the end of what it said if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise RuntimeError("\n".join([*errors[-5:], f"(exit code {done.returncode} of {command[0]})"]))


PLANS: dict[str, Callable[[Path, Path], Library]] = {"cpp": cpp_library, "cuda": cuda_library}


def build_all(target: Path, choice: str) -> dict[str, str]:
    """Build every backend that can be built into the folder `target`; for each "built", or why it was not.

    The objects of all backends are compiled side by side, as many at a time as there are cores, those of nvcc first,
    which take longest. What goes wrong with one backend leaves the others as they are.
    """
    report = {backend: why_not(backend, choice) or "" for backend in SOURCES}
    libraries: dict[str, Library] = {}
    jobs: dict[str, list[Future[bool]]] = {}
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for backend in [name for name in reversed(SOURCES) if not report[name]]:
            try:
                libraries[backend] = PLANS[backend](target / f"_{backend}.abi3.so", ROOT / "build" / backend)
            except Exception as error:  # Under auto the package works without, whatever went wrong.
                report[backend] = f"not built: {error}"
                continue
            commands = libraries[backend].objects
            jobs[backend] = [pool.submit(compile_unit, command, path) for path, command in commands.items()]
    for backend, library in libraries.items():
        try:
            compiled = sum(job.result() for job in jobs[backend])
            target.mkdir(parents=True, exist_ok=True)
            run(library.link)
        except Exception as error:  # As above.
            report[backend] = f"not built: {error}"
            continue
        print(f"caps_kernels: {backend}: {compiled} of {len(jobs[backend])} objects compiled {library.note}".rstrip())
    seconds = time.monotonic() - start
    report = {backend: reason or "built" for backend, reason in report.items()}
    print("\n".join(f"caps_kernels: {backend}: {reason}" for backend, reason in report.items()))
    print(f"caps_kernels: {seconds:.0f} s with {os.cpu_count()} compilers at a time")
    return report


class BuildKernels(build_ext):
    """Builds each backend on its own and writes what became of it to caps_kernels/_build.json."""

    def run(self) -> None:
        """Build what can be built and write the report."""
        choice = os.environ.get("CAPS_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(f"CAPS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
        target = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / "caps_kernels"
        report = build_all(target, choice)
        for backend, reason in report.items():
            if reason != "built" and choice == ASKED_BY[backend]:
                raise SystemExit(f"CAPS_BUILD={choice}, but {reason}")
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class PackageWithKernels(Distribution):
    """Has extension modules even where none is built, so that the report is always written."""

    def has_ext_modules(self) -> bool:
        """True: wheels are for one platform."""
        return True


if __name__ == "__main__":
    setup(cmdclass={"build_ext": BuildKernels}, distclass=PackageWithKernels)

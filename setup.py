"""Builds the compiled backends, and leaves a reason inside the package for each one it does not build.

CAPS_BUILD chooses: auto (the default: whatever this machine can build), cpu, cuda, or none. A backend asked for by name
that cannot be built fails the installation; under auto its reason is kept and the package works without it.
CXX and CXXFLAGS are honoured. An object is compiled again only where its command or a file it includes has changed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
SOURCES = {"cpp": ("csrc/cpu", "*.cpp"), "cuda": ("csrc/cuda", "*.cu")}
ASKED_BY = {"cpp": "cpu", "cuda": "cuda"}
FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
    # NaN, infinity and the order of sums keep their meaning; errno and floating-point traps are given up.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    # Runs on torch 2.11 and Python 3.10, and on all that are newer.
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"),
]


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
    return None


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


def cpp_commands(objects: Path) -> dict[Path, list[str]]:
    """The compile commands of backend "cpp", by object: csrc/library.cpp once, and each op of csrc/cpu for the host and
    for every instruction set.
    """
    import torch

    cxx, flags = str(compiler()), [*FLAGS, *os.environ.get("CXXFLAGS", "").split()]
    host = [f"-isystem{Path(torch.__file__).parent}/include", f"-isystem{sysconfig.get_paths()['include']}"]
    units = {"library": ("library", host)}
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        units[source.stem] = (f"cpu/{source.stem}", host)
        for name, march in instruction_sets().items():
            units[f"{source.stem}-{name}"] = (f"cpu/{source.stem}", [f"-DCAPS_ISA={name}", *march])
    return {
        objects / f"{name}.o": [cxx, *flags, *extra, f"-I{ROOT}/csrc/include", "-c", f"{ROOT}/csrc/{stem}.cpp"]
        for name, (stem, extra) in units.items()
    }


def compile_all(commands: Mapping[Path, Sequence[str]]) -> None:
    """Run compile commands, as many at a time as there are cores."""
    for target in commands:
        target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, commands.values(), commands))


def build_cpp(library: Path, objects: Path) -> None:
    """Compile backend "cpp" and link it."""
    import torch

    commands = cpp_commands(objects)
    compile_all(commands)
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *os.environ.get("CXXFLAGS", "").split(), f"-L{Path(torch.__file__).parent}/lib"]
    run([str(compiler()), "-shared", *flags, *map(str, commands), "-ltorch_cpu", "-o", str(library)])


def compile_unit(command: Sequence[str], target: Path) -> None:
    """Run a compile command unless `target` is newer than all it was made of."""
    made_of, stamp = target.with_suffix(".d"), target.with_suffix(".command")
    try:
        files = made_of.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        newest = max(os.stat(file).st_mtime for file in files)
        if target.stat().st_mtime > newest and stamp.read_text() == " ".join(command):
            return
    except OSError:
        pass
    run([*command, "-MMD", "-MF", str(made_of), "-o", str(target)])
    stamp.write_text(" ".join(command))


def run(command: Sequence[str]) -> None:
    """Run a command; RuntimeError with the end of what it said if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise RuntimeError("\n".join([*errors[-5:], f"(exit code {done.returncode} of {command[0]})"]))


BUILDERS: dict[str, Callable[[Path, Path], None]] = {"cpp": build_cpp}


class BuildKernels(build_ext):
    """Builds each backend on its own and writes what became of it to caps_kernels/_build.json."""

    def run(self) -> None:
        """Build what can be built and write the report."""
        choice = os.environ.get("CAPS_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(f"CAPS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
        target = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / "caps_kernels"
        report = {}
        for backend in SOURCES:
            reason = why_not(backend, choice)
            if reason is None:
                try:
                    BUILDERS[backend](target / f"_{backend}.abi3.so", ROOT / "build" / backend)
                except Exception as error:  # Under auto the package works without, whatever went wrong.
                    reason = f"not built: {error}"
            if reason is not None and choice == ASKED_BY[backend]:
                raise SystemExit(f"CAPS_BUILD={choice}, but {reason}")
            report[backend] = reason or "built"
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class PackageWithKernels(Distribution):
    """Has extension modules even where none is built, so that the report is always written."""

    def has_ext_modules(self) -> bool:
        """True: wheels are for one platform."""
        return True


if __name__ == "__main__":
    setup(cmdclass={"build_ext": BuildKernels}, distclass=PackageWithKernels)

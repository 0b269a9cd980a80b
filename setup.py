"""Builds the compiled backends, and leaves a reason inside the package for each one it does not build.

CAPS_BUILD chooses: auto (the default: whatever this machine can build), cpu, cuda, or none. A backend asked for by name
that cannot be built fails the installation; under auto its reason is kept and the package works without it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
SOURCES = {"cpp": ("csrc/cpu", "*.cpp"), "cuda": ("csrc/cuda", "*.cu")}
ASKED_BY = {"cpp": "cpu", "cuda": "cuda"}


def why_not(backend: str, choice: str) -> str | None:
    """Why a compiled backend is not to be built, or None."""
    if choice == "none" or (choice != "auto" and ASKED_BY[backend] != choice):
        return f"not built: CAPS_BUILD={choice} when the package was installed"
    folder, pattern = SOURCES[backend]
    if not any((ROOT / folder).glob(pattern)):
        return f"this version has no {'CUDA C++' if backend == 'cuda' else 'C++'} kernels"
    if backend == "cpp" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return "not built: no C++ compiler was found when the package was installed"
    if backend == "cuda" and not shutil.which("nvcc"):
        return "not built: nvcc was not found when the package was installed"
    return None


class BuildKernels(build_ext):
    """Builds each backend on its own and writes what became of it to caps_kernels/_build.json."""

    def run(self) -> None:
        """Build what can be built and write the report."""
        choice = os.environ.get("CAPS_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(f"CAPS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
        report = {}
        for backend in SOURCES:
            reason = why_not(backend, choice)
            if reason is not None and choice == ASKED_BY[backend]:
                raise SystemExit(f"CAPS_BUILD={choice}, but {reason}")
            report[backend] = reason or "built"
        target = ROOT if self.editable_mode or self.inplace else Path(self.build_lib)
        path = target / "caps_kernels" / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class PackageWithKernels(Distribution):
    """Has extension modules even where none is built, so that the report is always written."""

    def has_ext_modules(self) -> bool:
        """True: wheels are for one platform."""
        return True


if __name__ == "__main__":
    setup(cmdclass={"build_ext": BuildKernels}, distclass=PackageWithKernels)

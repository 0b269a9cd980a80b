"""The one place that loads the compiled libraries, and keeps the reason when one is missing."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

BUILD_REPORT = Path(__file__).with_name("_build.json")
"""Written by setup.py: for each compiled backend "built", or why it was not."""


def _build_report() -> dict[str, str]:
    try:
        report = json.loads(BUILD_REPORT.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError(f"it holds a {type(report).__name__} in place of an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return dict.fromkeys(("cpp", "cuda"), f"{BUILD_REPORT.name} cannot be read: {error}")
    return {str(backend): str(reason) for backend, reason in report.items()}


def _load(backend: str, report: dict[str, str]) -> str | None:
    """Load the compiled library of a backend; why it cannot be used, or None."""
    reason = report.get(backend, "setup.py has not built it; run `pip install -e .`")
    if reason != "built":
        return reason
    if backend == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        importlib.import_module(f"caps_kernels._{backend}")
    except (ImportError, OSError) as error:
        return f"its library was built but does not load: {error}"
    return None


MISSING = {backend: _load(backend, _build_report()) for backend in ("cpp", "cuda")}
"""Why each compiled backend cannot be used, or None. Filled at import, so that traced code sees a constant."""


def isa_names() -> list[str]:
    """The instruction sets for which backend "cpp" has kernels that this processor can run, the best last.

    Raises:
        ImportError: the library of "cpp" is not there.
    """
    names: list[str] = importlib.import_module("caps_kernels._cpp").isa_names()
    return names


def force_innermost_cache(size: int) -> AbstractContextManager[None]:
    """Cut the work of "cpp" as for an innermost data cache of `size` bytes during a block, in all threads: for tests.

    Raises:
        ImportError: the library of "cpp" is not there.
    """
    return _force("innermost_cache", size)


def force_outer_cache(size: int) -> AbstractContextManager[None]:
    """Choose the regimes of "cpp" as for a shared cache of `size` bytes during a block, in all threads: for tests.

    Raises:
        ImportError: the library of "cpp" is not there.
    """
    return _force("outer_cache", size)


def force_isa(name: str) -> AbstractContextManager[None]:
    """Run the kernels of "cpp" for one instruction set during a block, in all threads: for tests.

    Raises:
        ImportError: the library of "cpp" is not there.
        ValueError: the processor cannot run it; nothing was changed.
    """
    return _force("isa", name)


@contextmanager
def _force(setting: str, value: object) -> Iterator[None]:
    library = importlib.import_module("caps_kernels._cpp")
    get, put = getattr(library, f"get_{setting}"), getattr(library, f"set_{setting}")
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)

"""Triton's interpreter, quicker: for tests and counts, which run small kernels in it."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Let Triton's interpreter prepare its language once for a launch.

    As it comes it looks through all members of `triton.language` whenever one function of a kernel calls another, to
    replace those that are not yet replaced: half of the time of a small kernel.
    """
    prepare = interpreter._patch_lang

    def prepare_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        prepared = not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if prepared else prepare(function)

    interpreter._patch_lang = prepare_once

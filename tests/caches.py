"""Caches of pretended sizes, by which backend "cpp" chooses how it runs dense_capsules, whatever the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from caps_kernels import _extension

KIB, MIB = 1 << 10, 1 << 20
CACHES = {"tiles": (32 * KIB, 0), "spread": (48 * KIB, 0), "quads": (32 * KIB, 32 * MIB)}
"""Bytes of the innermost and of the shared cache for which a call goes to quads, or where there is no such shared cache
to tiles, and these take one lower capsule at a time ("spread"); everywhere, few samples may go to rows."""


@contextmanager
def caches_for(way: str, outer: int | None = None) -> Iterator[None]:
    """Run a block as on a machine whose caches call for "tiles", "spread" or "quads". outer: another shared cache."""
    innermost, usual = CACHES[way]
    with _extension.force_innermost_cache(innermost), _extension.force_outer_cache(usual if outer is None else outer):
        yield

"""Sizes at which the kernels of csrc/cuda change their ways: both sides of every tile."""

from __future__ import annotations

from tests.cases import CASES, squash

TILES = (
    # A row is one pack of 16 bytes, or of 1 number; 2 … 32 lanes; more than 32 lanes hold.
    *(squash(f"row-{size}", 5, size) for size in (2, 4, 8, 9, 16, 31, 32, 33, 64, 65, 128, 129, 132, 256, 264)),
    # One block and a little more: 256 threads of a row each, and of a column each.
    squash("rows-255", 255, 1),
    squash("rows-257", 257, 1),
    squash("rows-65", 65, 16),
    squash("columns-256", 2, 3, 128, dim=1),
    squash("columns-257", 3, 257, dim=0),
)
HOST_CASES = (*CASES, *TILES)

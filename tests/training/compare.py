"""Whether two runs came out the same, bit for bit."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from training import checkpoint
from training.report import TIMING_COLUMNS


def leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and number in nested containers, with its place."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{where}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{where}/{index}")
    else:
        yield where, tree


def assert_same_state(one: Path, other: Path) -> None:
    """The same weights, moments, random numbers and position in two checkpoints."""
    first, second = checkpoint.load(one), checkpoint.load(other)
    assert (first.epoch, first.batch, first.sums) == (second.epoch, second.batch, second.sums)
    for part in ("model", "optimizer", "rng"):
        pairs = zip(leaves(getattr(first, part)), leaves(getattr(second, part)), strict=True)
        for (where, a), (there, b) in pairs:
            assert where == there
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, f"{part}{where} differs"


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what depends on time."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in rows]


def assert_same_runs(one: Path, other: Path) -> None:
    """Every checkpoint, best.pt and metrics.csv agree, and nothing half-written lies around."""
    names = sorted(file.name for file in (one / "checkpoints").glob("*.pt"))
    assert names == sorted(file.name for file in (other / "checkpoints").glob("*.pt"))
    for name in (*(f"checkpoints/{name}" for name in names), "best.pt"):
        assert_same_state(one / name, other / name)
    assert metrics(one) == metrics(other)
    assert not list(other.rglob(".*.tmp"))
    assert not (other / "interrupted.pt").exists()

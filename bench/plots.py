"""A picture of a run: time against B, I, J and R, and memory against I, on logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import AXES, on_axis
from bench.targets import OURS, Record

_LINES = {"ours": "tab:red", "compile": "tab:blue", "eager": "tab:green", "peer": "tab:gray"}


def save(record: Record, path: Path) -> None:
    """Write the picture; sizes that were not run or did not fit are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4.2), constrained_layout=True)
    for axis, letter in zip(axes, "BIJR", strict=False):
        _times(axis, letter, record)
    _memory(axes[4], record)
    axes[0].legend(fontsize=8)
    figure.suptitle("Capsule layer, forward + backward (around B128 I1152 J10 D8 E16 R3); lower is better", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def points(record: Record, letter: str, who: str) -> list[tuple[int, float]]:
    """Size and milliseconds of forward and backward along one of `AXES`."""
    found = []
    for case in on_axis(letter):
        seconds = record.seconds(case.name, who, "both")
        if seconds is not None:
            found.append((int(getattr(case, AXES[letter][0])), 1e3 * seconds))
    return found


def _times(axis: Any, letter: str, record: Record) -> None:
    for who, color in _LINES.items():
        found = points(record, letter, who)
        if found:
            axis.plot(*zip(*found, strict=True), "o-", color=color, label="this project" if who == "ours" else who)
    _label(axis, AXES[letter][1], "milliseconds")


def _memory(axis: Any, record: Record) -> None:
    best = next((name for name in OURS if any(name in peaks for peaks in record.peaks.values())), "")
    for name, color in ((best, "tab:red"), ("einsum", "tab:green"), ("peer", "tab:gray")):
        found = []
        for case in on_axis("I"):
            size = record.peaks.get(case.name, {}).get(name, {}).get("both")
            if isinstance(size, int):
                found.append((case.in_capsules, size / 2**20))
        if found:
            axis.plot(*zip(*found, strict=True), "o-", color=color, label="this project" if name == best else name)
    if axis.lines:
        axis.legend(fontsize=8)
    _label(axis, AXES["I"][1], "peak memory, MiB")


def _label(axis: Any, x: str, y: str) -> None:
    axis.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axis.grid(True, which="both", alpha=0.25)

"""The pictures of a run: curves.png and confusion.png."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from training.run_dir import write_atomically

TRAIN, VALIDATION, THIRD = "#8a93a5", "#0b6e99", "#d97706"
INK, GRID = "#2b2f36", "#e3e6eb"
LARGEST_WITH_NUMBERS = 30
"""Classes up to which the cells of the confusion matrix show their counts."""
LONGEST_NAME = 28
POINTS_PER_INCH = 72


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        history: the rows of metrics.csv, one or more.
        path: the PNG to write.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, share, rate = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))

    def line(axes: Axes, column: str, label: str, colour: str, style: str = "-") -> None:
        values = [row[column] for row in history]
        marker = "o" if len(epochs) < 25 else ""
        axes.plot(epochs, values, style, color=colour, label=label, marker=marker, ms=3.5, lw=1.8)

    line(loss, "train_loss", "training", TRAIN)
    line(loss, "validation_loss", "validation", VALIDATION)
    loss.set_ylim(bottom=0)
    line(share, "train_top1", "top-1, training", TRAIN)
    line(share, "validation_top1", "top-1, validation", VALIDATION)
    line(share, "validation_f1", "F1 (micro), validation", THIRD)
    line(share, "validation_no_logo", "no logo, validation", THIRD, ":")
    share.set_ylim(0, 1.02)
    share.yaxis.set_major_formatter(PercentFormatter(1))
    line(rate, "learning_rate", "at the epoch's end", INK)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes, title in ((loss, "Loss"), (share, "Accuracy and F1"), (rate, "Learning rate")):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_xlabel("epoch", color=INK)
        axes.set_xlim(0.5, max(epochs[-1], 2) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path, dpi=130)


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw which logo is taken for which; colours are shares of a row.

    Args:
        counts: [classes, classes], row the true class, column the predicted one.
        classes: their names.
        path: the PNG to write.
    """
    table = counts.numpy()
    rows = table.sum(1, keepdims=True)
    shares = np.divide(table, rows, out=np.zeros(table.shape), where=rows > 0)
    count = len(classes)
    side = min(max(5.0, 2.2 + 0.33 * count), 14.0)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = min(9.0, 0.6 * POINTS_PER_INCH * (side - 2.2) / count)
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in classes]
    # Names come with the data: a $ in one must not be read as mathematics.
    text: dict[str, Any] = {"fontsize": size, "color": INK, "parse_math": False}
    axes.set_xticks(range(count), names, rotation=90, **text)
    axes.set_yticks(range(count), names, **text)
    axes.set_xlabel("longest capsule", color=INK)
    axes.set_ylabel("logo on the image", color=INK)
    right, total = int(np.trace(table)), int(table.sum())
    title = f"Validation images with one logo: {right:,} of {total:,} right"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=GRID, lw=0.6)
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_color(GRID)
    if count <= LARGEST_WITH_NUMBERS:
        for true, predicted in zip(*np.nonzero(table), strict=True):
            colour = "white" if shares[true, predicted] > 0.5 else INK
            axes.text(
                predicted,
                true,
                str(table[true, predicted]),
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, format=PercentFormatter(1), pad=0.02)
    bar.set_label("share of the logo's images", color=INK)
    bar.outline.set_visible(False)
    _save(figure, path, dpi=120)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    # A canvas of its own: pyplot would look for a display and keep every figure alive.
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(content, dpi=dpi, facecolor="white", format="png")
    write_atomically(path, content.getvalue())

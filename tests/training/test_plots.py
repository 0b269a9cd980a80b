from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from training import plots
from training.report import COLUMNS

BLUE = (8, 48, 107)
"""The darkest of the confusion matrix's colours: all of a row."""


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def coloured(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture.astype(int) - colour).max(-1) < 12).sum())


def history(*top1: float) -> list[dict[str, float]]:
    row = dict.fromkeys(COLUMNS, 0.5)
    return [{**row, "epoch": n, "validation_top1": x} for n, x in enumerate(top1, 1)]


def test_curves_show_the_values(tmp_path: Path) -> None:
    plots.draw_curves(history(0.2, 0.9), tmp_path / "rising.png")
    plots.draw_curves(history(0.2, 0.1), tmp_path / "falling.png")
    rising, falling = pixels(tmp_path / "rising.png"), pixels(tmp_path / "falling.png")
    assert rising.shape == falling.shape
    assert min(rising.shape[:2]) > 300
    accuracy = slice(rising.shape[1] // 3, rising.shape[1] * 2 // 3)
    assert (rising[:, accuracy] != falling[:, accuracy]).any(-1).sum() > 500
    validation = tuple(int(plots.VALIDATION[i : i + 2], 16) for i in (1, 3, 5))
    assert coloured(rising, (validation[0], validation[1], validation[2])) > 500


@pytest.mark.parametrize("values", [(0.5,), (math.nan, math.nan)])
def test_curves_of_one_epoch_and_of_nothing(tmp_path: Path, values: tuple[float, ...]) -> None:
    plots.draw_curves(history(*values), tmp_path / "curves.png")
    assert len(np.unique(pixels(tmp_path / "curves.png").reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("count", [2, 20, 59])
def test_confusion_is_dark_where_the_counts_are(tmp_path: Path, count: int) -> None:
    names = [f"logo {index}" for index in range(count)]
    file = tmp_path / "confusion.png"
    plots.draw_confusion(torch.eye(count).long() * 4, names, file)
    right = pixels(file)
    plots.draw_confusion(torch.zeros(count, count, dtype=torch.long), names, file)
    nothing = pixels(file)
    assert max(right.shape) < 2500
    # The colour bar has the darkest colour too.
    cell = coloured(right, BLUE) - coloured(nothing, BLUE)
    assert cell > 100 * count


def test_names_are_not_read_as_mathematics(tmp_path: Path) -> None:
    names = ["$\\frac$", "a_b^c$", "\u65e5\u672c", "x" * 500]
    plots.draw_confusion(torch.eye(4).long(), names, tmp_path / "confusion.png")
    assert max(pixels(tmp_path / "confusion.png").shape) < 1500

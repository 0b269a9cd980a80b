"""What is counted over images, and the ratios made of the counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Means over a set of images; NaN where the set has nothing to take a mean of."""

    images: int
    loss: float
    """Mean over all images."""
    top1: float
    """Of the images with exactly one logo, the share whose longest capsule is that logo's."""
    f1: float
    """Multi-label F1, micro-averaged: 2 TP / (2 TP + FP + FN) counted over every image and class,
    a logo being predicted where its capsule is longer than the presence threshold."""
    no_logo: float
    """Of the images without a logo, the share on which no logo is predicted."""

    @property
    def rank(self) -> tuple[float, float]:
        """What the best epoch is chosen by: top-1, then F1; NaN ranks below all."""
        return tuple(-1.0 if math.isnan(x) else x for x in (self.top1, self.f1))  # type: ignore[return-value]


class RunningSums:
    """Counts over the images seen so far, kept on the device so that nobody waits for it."""

    NAMES = (
        "images",
        "loss",
        "single",
        "single_right",
        "true_positive",
        "false_positive",
        "false_negative",
        "empty",
        "empty_right",
    )

    def __init__(self, presence_threshold: float, device: torch.device, values: Sequence[float] = ()) -> None:
        self.presence_threshold = presence_threshold
        start = list(values) or [0.0] * len(self.NAMES)
        self._sums = torch.tensor(start, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, scores: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            loss: [], the batch's mean loss.
            scores: [B, classes], the lengths of the class capsules.
            target: [B, classes], 1 where the logo is on the image and 0 elsewhere.
        """
        truth = target > 0.5
        predicted = scores > self.presence_threshold
        logos = truth.sum(1)
        single = logos == 1
        empty = logos == 0
        right = scores.argmax(1) == target.argmax(1)
        counts = (
            (truth & predicted).sum(),
            (~truth & predicted).sum(),
            (truth & ~predicted).sum(),
            empty.sum(),
            (empty & ~predicted.any(1)).sum(),
        )
        images = torch.tensor(len(target), device=loss.device)
        head = (images, loss.detach().double() * images, single.sum(), (single & right).sum())
        self._sums += torch.stack([count.double() for count in (*head, *counts)])

    def values(self) -> list[float]:
        """The sums in the order of `NAMES`, exact; `RunningSums(…, values)` goes on from them."""
        return [float(value) for value in self._sums.tolist()]

    def metrics(self) -> Metrics:
        """The means over everything counted so far."""
        n = dict(zip(self.NAMES, self.values(), strict=True))
        pairs = 2 * n["true_positive"]
        return Metrics(
            images=int(n["images"]),
            loss=_ratio(n["loss"], n["images"]),
            top1=_ratio(n["single_right"], n["single"]),
            f1=_ratio(pairs, pairs + n["false_positive"] + n["false_negative"]),
            no_logo=_ratio(n["empty_right"], n["empty"]),
        )


def confusion(scores: Tensor, target: Tensor) -> Tensor:
    """Count, over images with exactly one logo, which logo is taken for which.

    Args:
        scores: [B, classes], the lengths of the class capsules.
        target: [B, classes], 1 where the logo is on the image and 0 elsewhere.

    Returns:
        [classes, classes], long, on the CPU: row the true class, column the longest capsule's.
    """
    classes = target.shape[1]
    single = (target > 0.5).sum(1) == 1
    cells = target[single].argmax(1) * classes + scores[single].argmax(1)
    return torch.bincount(cells.cpu(), minlength=classes * classes).view(classes, classes)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

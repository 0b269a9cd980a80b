"""Which images a step sees and how fast it may learn: functions of seed, epoch and step alone."""

from __future__ import annotations

import math
import signal
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from logos.splits import DataError, Split
from training.errors import TrainingError

WARM_UP = 0.05
"""The share of all steps in which the learning rate rises."""
GRACE_SECONDS = 30
"""How long a process that loads images lives on after SIGTERM."""


def order(images: int, seed: int, epoch: int) -> list[int]:
    """The order of the training images in `epoch`: a permutation that depends on nothing else."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return [int(index) for index in generator.permutation(images)]


def count(images: int, batch_size: int, limit: int | None) -> int:
    """How many batches an epoch over `images` has; the last one may be smaller."""
    batches = math.ceil(images / batch_size)
    return batches if limit is None else min(batches, limit)


def learning_rate(step: int, total: int, peak: float) -> float:
    """The rate of `step` (from 0) of `total`: a linear warm-up to `peak`, then a cosine to 0."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def iterate(
    split: Split, indices: Sequence[int], batch_size: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images, uint8 [B, 3, H, W], and targets, float32 [B, classes], on `device`.

    Raises:
        DataError: an image cannot be read any more.
        TrainingError: a process that loads images died.
    """
    on_gpu = device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        cast("Dataset[Any]", split),
        batch_size=batch_size,
        sampler=indices,
        num_workers=workers,
        pin_memory=on_gpu,
        worker_init_fn=_outlive_signals,
        # Without a generator of its own a loader draws from the global one each time it starts,
        # and a run resumed in mid-epoch, which starts once more, would go on with other numbers.
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    try:
        while (batch := _next(batches)) is not None:
            images, targets = batch
            yield images.to(device, non_blocking=on_gpu), targets.to(device, non_blocking=on_gpu)
    finally:
        # The last reference: this ends the workers now, not when some traceback is forgotten.
        del batches


def _next(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    problem: Exception
    try:
        return next(batches)
    except StopIteration:
        return None
    except DataError as error:
        # A worker's error comes wrapped in the text of its traceback.
        problem = DataError(str(error).rpartition("DataError: ")[2].strip())
        traceback.clear_frames(error.__traceback__)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        problem = TrainingError(f"a process that loads images died: {error}. Try --workers 0")
    # No frame that a traceback keeps may keep the workers alive.
    del batches
    raise problem


def _outlive_signals(_worker: int) -> None:
    # Ctrl-C, and SIGTERM from some schedulers, reach every process of a run; the main one still
    # needs its workers to finish the step, and their death would break into it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))

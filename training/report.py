"""What a run tells: a row of metrics.csv and a line an epoch, a table at the end."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence

import torch

from training.metrics import Metrics

TIMING_COLUMNS = ("train_seconds", "images_per_second", "elapsed_seconds")
COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_top1",
    "train_f1",
    "validation_loss",
    "validation_top1",
    "validation_f1",
    "validation_no_logo",
    "train_images",
    *TIMING_COLUMNS,
)
HEADER = "epoch    loss train/val    top-1 train/val    F1 val   images/s   elapsed   learning rate"


def epoch_row(
    epoch: int,
    rate: float,
    train: Metrics,
    validation: Metrics,
    train_seconds: float,
    elapsed: float,
) -> dict[str, float]:
    """One row of metrics.csv; the columns are described in training/README.md."""
    values = (
        epoch,
        rate,
        train.loss,
        train.top1,
        train.f1,
        validation.loss,
        validation.top1,
        validation.f1,
        validation.no_logo,
        train.images,
        train_seconds,
        train.images / train_seconds,
        elapsed,
    )
    return dict(zip(COLUMNS, values, strict=True))


def check_history(history: Sequence[Mapping[str, float]], epochs: int) -> None:
    """Refuse rows that are not those of `epochs` whole epochs.

    Raises:
        ValueError: a row is missing or of another kind.
    """
    if [row.get("epoch") for row in history] != list(range(1, epochs + 1)):
        raise ValueError("its epochs are not counted from 1")
    if any(set(row) != set(COLUMNS) for row in history):
        raise ValueError("its metrics have other columns")


def row_rank(row: Mapping[str, float]) -> tuple[float, float]:
    """What epochs are compared by, as `Metrics.rank`."""
    top1, f1 = (row["validation_top1"], row["validation_f1"])
    return (-1.0 if math.isnan(top1) else top1, -1.0 if math.isnan(f1) else f1)


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """The line of one epoch, under `HEADER`."""
    width = len(str(epochs))
    epoch = f"{int(row['epoch']):{width}d}/{epochs}"
    return (
        f"{epoch:<7}  {row['train_loss']:7.4f} / {row['validation_loss']:.4f}"
        f"   {percent(row['train_top1'])} / {percent(row['validation_top1'])}"
        f"   {row['validation_f1']:6.3f}   {row['images_per_second']:8.0f}"
        f"   {clock(row['elapsed_seconds']):>7}   {row['learning_rate']:.2e}"
    )


def final_table(
    found: Mapping[str, Metrics],
    history: Sequence[Mapping[str, float]],
    epoch: int,
    device: torch.device,
) -> str:
    """The table at the end of a run.

    Args:
        found: the best checkpoint on the validation images and each further test set, by name.
        history: the rows of metrics.csv.
        epoch: which epoch the best checkpoint is of.
        device: where it was trained.
    """
    head = f"Weights of best.pt (epoch {epoch})"
    lines = [f"{head:<36}  top-1, one logo   F1, micro   no logo right"]
    for name, metrics in found.items():
        f1 = "–" if math.isnan(metrics.f1) else f"{metrics.f1:.3f}"
        label = f"{name} ({metrics.images:,} images)"
        top1, no_logo = percent(metrics.top1), percent(metrics.no_logo)
        lines.append(f"{label:<36}  {top1:>14}   {f1:>9}   {no_logo:>13}")
    seconds = sum(row["train_seconds"] for row in history)
    images = sum(row["train_images"] for row in history)
    lines.append(f"{'training speed':<36}  {images / seconds:,.0f} images/s")
    lines.append(f"{'peak memory':<36}  {peak_memory(device)}")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> str:
    """The most memory this process has held at once, and the most on its GPU if it used one."""
    # Linux counts in KiB.
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if device.type == "cuda":
        text += f", GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return text


def percent(share: float) -> str:
    """A share of 1 as "97.3 %"; a dash where there was nothing to count."""
    return f"{'–':>7}" if math.isnan(share) else f"{100 * share:5.1f} %"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""What every source of logo images hands to training: splits of images with multi-hot targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Split(Protocol):
    """Images with the set of logos on each; a map-style dataset for `torch.utils.data.DataLoader`."""

    targets: NDArray[np.uint8]
    """[N, classes], 1 where the logo is on the image; a row of zeros is an image without a logo."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, uint8 RGB [3, H, W], and its target, float32 [classes]."""
        ...


@dataclass(frozen=True)
class LogoData:
    """A data set: its class names in the order of the targets' columns, and its splits."""

    classes: tuple[str, ...]
    train: Split
    validation: Split
    tests: Mapping[str, Split] = field(default_factory=dict)
    """Further test sets by name, such as the same brands drawn by another artist."""


class DataError(Exception):
    """The data cannot be used; the message names the file and says what to do."""

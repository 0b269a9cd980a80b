"""How a model is trained unless the user says otherwise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """Training settings that belong to a model."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    presence_threshold: float = 0.5
    """A class is present where its capsule is longer than this."""
    channels_last: bool = False
    """Whether its convolutions are faster on images that lie in memory as [B, H, W, C]."""

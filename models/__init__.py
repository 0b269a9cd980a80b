"""Networks to train, each a module that exposes everything the training script needs.

A module `models/<name>.py` has

    IMAGE_SIZE   (H, W) of the images it is fed, unless the user asks for another size
    DEFAULTS     the `Defaults` of its training
    preprocess   uint8 images [B, 3, H, W] to the network's input, float32 [B, C, h, w]
    Network      classes, image_size, *, iterations, routing_grad, backend; input [B, C, h, w] to v [B, J, E]
    loss         network, its input, v, target [B, J] to a scalar

so that network, preprocessing and loss change together with one name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor, nn

from models.defaults import Defaults as Defaults

_NAMES = ("logo_capsnet", "politically_correct")


class Model(Protocol):
    """What a model's module exposes."""

    IMAGE_SIZE: tuple[int, int]
    DEFAULTS: Defaults
    Network: type[nn.Module]

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, C, h, w]."""
        ...

    def loss(self, network: nn.Module, x: Tensor, v: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of v [B, J, E] for presences `target`, float32 [B, J], and inputs `x`."""
        ...


def names() -> tuple[str, ...]:
    """Names of all models, the default first."""
    return _NAMES


def get(name: str) -> Model:
    """The module of a model. Raises ValueError for an unknown name."""
    if name not in _NAMES:
        raise ValueError(f"model must be one of {', '.join(_NAMES)}, got {name!r}")
    return cast(Model, import_module(f"models.{name}"))

"""A colour CapsNet for logos at any place: the default.

Four convolutions with max pooling bring 64x64 pixels down to 8x8 positions, so that the number of lower capsules stays
small; primary capsules share their transformation matrices over the positions, so that a logo is recognised wherever
it stands. There is no batch normalisation.
"""

from __future__ import annotations

from torch import Tensor, nn

import caps_kernels as ck
from models.defaults import Defaults

IMAGE_SIZE = (64, 64)
DEFAULTS = Defaults(epochs=20, batch_size=32, learning_rate=1e-3)

_CHANNELS = (32, 64, 128)
_TYPES, _DIM = 8, 8
_margin = ck.MarginLoss()


def preprocess(images: Tensor) -> Tensor:
    """RGB values in [-1, 1], float32 [B, 3, H, W], from uint8."""
    return images / 127.5 - 1


class Network(nn.Module):
    """Convolutional stem, primary capsules with matrices shared over positions, class capsules 16D.

    Args:
        classes: J.
        image_size: (H, W), at least 8x8.
        iterations: R, routing iterations.
        routing_grad: "full" or "last".
        backend: of the capsule ops.
    """

    def __init__(
        self,
        classes: int,
        image_size: tuple[int, int] = IMAGE_SIZE,
        *,
        iterations: int = 3,
        routing_grad: str = "full",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        positions = (image_size[0] // 8) * (image_size[1] // 8)
        if positions < 1:
            raise ValueError(f"image_size must be at least 8x8, got {image_size[0]}x{image_size[1]}")
        layers: list[nn.Module] = []
        channels = 3
        for width in _CHANNELS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.primary = ck.PrimaryCapsules(channels, _TYPES, _DIM, kernel_size=3, padding=1, backend=backend)
        self.classes = ck.CapsuleLayer(
            _TYPES * positions,
            _DIM,
            classes,
            16,
            iterations,
            positions=positions,
            routing_grad=routing_grad,
            backend=backend,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class capsules v [B, J, 16] from RGB images [B, 3, H, W]."""
        v: Tensor = self.classes(self.primary(self.stem(x)))
        return v


def loss(network: nn.Module, x: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """The margin loss."""
    total: Tensor = _margin(v, target)
    return total

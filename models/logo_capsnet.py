"""A colour CapsNet for logos at any place: the default.

Four convolutions with max pooling bring 64x64 pixels down to 4x4 positions, so that the number of lower capsules stays
small (256 at 64x64); primary capsules share their transformation matrices over the positions, so that a logo is
recognised wherever it stands. There is no batch normalisation: weights are initialised to keep the signal's size.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

import caps_kernels as ck
from models.defaults import Defaults

IMAGE_SIZE = (64, 64)
DEFAULTS = Defaults(epochs=12, batch_size=32, learning_rate=1.5e-3, channels_last=True)

_CHANNELS = (32, 64, 128, 128)
_TYPES, _DIM = 16, 8
_SHRINK = 2 ** len(_CHANNELS)
_margin = ck.MarginLoss()


def preprocess(images: Tensor) -> Tensor:
    """RGB values in [-1, 1], float32 [B, 3, H, W], from uint8."""
    return images / 127.5 - 1


class Network(nn.Module):
    """Convolutional stem, primary capsules 16 x 8D with matrices shared over positions, class capsules 16D.

    Args:
        classes: J.
        image_size: (H, W), at least 16x16.
        iterations: R, routing iterations.
        routing_grad: "full" or "last".
        backend: of the capsule ops.

    Raises:
        ValueError: the images are too small.
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
        positions = (image_size[0] // _SHRINK) * (image_size[1] // _SHRINK)
        if positions < 1:
            raise ValueError(f"image_size must be at least {_SHRINK}x{_SHRINK}, got {image_size[0]}x{image_size[1]}")
        layers: list[nn.Module] = []
        channels = 3
        for width in _CHANNELS:
            # The same values as pooling after the ReLU, which has a quarter of the work here.
            layers += [_convolution(channels, width), nn.MaxPool2d(2), nn.ReLU()]
            channels = width
        self.stem = nn.Sequential(*layers)
        self.primary = ck.PrimaryCapsules(channels, _TYPES, _DIM, kernel_size=3, padding=1, backend=backend)
        # Lower capsules start with |s| about 1, where squash neither shrinks nor saturates them.
        nn.init.normal_(self.primary.conv.weight, std=math.sqrt(2 / (9 * channels * _DIM)))
        nn.init.zeros_(self.primary.conv.bias)  # type: ignore[arg-type]
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


def _convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of images, and through a ReLU that of their values."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv

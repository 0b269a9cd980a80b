"""The network of the 2017 entry without its bugs: a small grey CapsNet.

The entry took the network of Sabour, Frosst & Hinton, "Dynamic Routing Between Capsules" (2017, arXiv 1710.09829,
section 4) to 59 TV-channel logos. What it got wrong is right here: couplings sum to 1 over the classes instead of over
the lower capsules, one set of routing logits a sample, capsules grouped by type instead of cut across positions, and
every logo of an image counts instead of the first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import caps_kernels as ck
from models.defaults import Defaults

IMAGE_SIZE = (28, 28)
DEFAULTS = Defaults(epochs=10, batch_size=64, learning_rate=1e-3)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_margin = ck.MarginLoss()


def preprocess(images: Tensor) -> Tensor:
    """Grey values in [0, 1], float32 [B, 1, H, W], from uint8 [B, 3, H, W]."""
    weights = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1) / 255
    grey: Tensor = (images * weights).sum(1, keepdim=True)
    return grey


class Network(nn.Module):
    """Convolution 9x9 with 256 channels, primary capsules 32 x 8D (9x9, stride 2), class capsules 16D, decoder.

    Args:
        classes: J.
        image_size: (H, W), at least 17x17.
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
        height, width = ((side - 8 - 9) // 2 + 1 for side in image_size)
        if min(height, width) < 1:
            raise ValueError(f"image_size must be at least 17x17, got {image_size[0]}x{image_size[1]}")
        self.stem = nn.Sequential(nn.Conv2d(1, 256, 9), nn.ReLU())
        self.primary = ck.PrimaryCapsules(256, 32, 8, kernel_size=9, stride=2, backend=backend)
        self.classes = ck.CapsuleLayer(
            32 * height * width,
            8,
            classes,
            16,
            iterations,
            routing_grad=routing_grad,
            backend=backend,
        )
        self.decoder = ck.Decoder(classes, 16, (1, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        """Class capsules v [B, J, 16] from grey images [B, 1, H, W]."""
        v: Tensor = self.classes(self.primary(self.stem(x)))
        return v


def loss(network: nn.Module, x: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """Margin loss plus the reconstruction's, as in the paper."""
    decoder: ck.Decoder = network.decoder  # type: ignore[assignment]
    total: Tensor = _margin(v, target) + decoder.loss(decoder(v, target), x)
    return total

"""Modules of capsule networks: thin, each its parameters and a functional call."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn

from caps_kernels import _checks
from caps_kernels.functional import dense_capsules, squash

__all__ = ["CapsuleLayer", "Decoder", "MarginLoss", "PrimaryCapsules"]


class CapsuleLayer(nn.Module):
    """A dense capsule layer with dynamic routing: every lower capsule votes for every higher one.

    Args:
        in_capsules: I, number of lower capsules.
        in_dim: D, their dimension.
        out_capsules: J, number of higher capsules (classes, in the last layer).
        out_dim: E, their dimension.
        iterations: R, number of routing softmaxes.
        positions: P, how many consecutive lower capsules share their matrices; I must be a multiple. With
            `PrimaryCapsules`, P = H·W shares them over all positions of a type.
        bias: learn a bias [J, E] added to every total input.
        leaky: leaky routing, one more parent in every softmax, whose share is dropped.
        routing_grad: "full" or "last", see `functional.dense_capsules`.
        backend: None (the best that can run), "reference", "cpp", "cuda" or "triton".
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: Parameter [I // P, J, D, E].
        bias: Parameter [J, E], or None.

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or I is not a multiple of P.

    Source: Sabour, Frosst & Hinton, "Dynamic Routing Between Capsules" (2017, arXiv 1710.09829), section 4.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        iterations: int = 3,
        *,
        positions: int = 1,
        bias: bool = False,
        leaky: bool = False,
        routing_grad: str = "full",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_capsules = _checks.positive_int("in_capsules", in_capsules)
        self.in_dim = _checks.positive_int("in_dim", in_dim)
        self.out_capsules = _checks.positive_int("out_capsules", out_capsules)
        self.out_dim = _checks.positive_int("out_dim", out_dim)
        self.iterations = _checks.positive_int("iterations", iterations)
        self.positions = _checks.positive_int("positions", positions)
        self.leaky = _checks.flag("leaky", leaky)
        self.routing_grad = _checks.routing_grad(routing_grad)
        self.backend = _checks.backend(backend)
        if self.in_capsules % self.positions:
            raise ValueError(f"in_capsules must be a multiple of positions, {positions}, got {in_capsules}")
        shape = (self.in_capsules // self.positions, self.out_capsules, self.in_dim, self.out_dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        shape_of_bias = (self.out_capsules, self.out_dim)
        has_bias = _checks.flag("bias", bias)
        self.bias = nn.Parameter(torch.empty(shape_of_bias, device=device, dtype=dtype)) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std) with std = 0.55 J / √(I E √D), and set the bias to 0.

        At uniform coupling 1/J, |s|² is about E·std²·Σ_i|u_i|² / J². The |u_i|² of lower capsules lie between 1
        (squashed) and D (of unit variance); with √D, the middle, squashed ones start |v| between 0.05 and 0.9 but for
        a handful of lower capsules or dimensions.
        """
        spread = math.sqrt(self.in_capsules * self.out_dim * math.sqrt(self.in_dim))
        nn.init.normal_(self.weight, std=0.55 * self.out_capsules / spread)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @overload
    def forward(self, u: Tensor, return_coupling: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, u: Tensor, return_coupling: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, u: Tensor, return_coupling: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """v [B, J, E] from u [B, I, D]; with `return_coupling` (v, coupling [B, I, J]), detached."""
        return dense_capsules(  # type: ignore[call-overload, no-any-return]
            u,
            self.weight,
            self.bias,
            self.iterations,
            positions=self.positions,
            leaky=self.leaky,
            routing_grad=self.routing_grad,
            return_coupling=return_coupling,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("positions", self.positions, 1),
                ("bias", self.bias is not None, False),
                ("leaky", self.leaky, False),
                ("routing_grad", self.routing_grad, "full"),
                ("backend", self.backend, None),
            )
            if value != default
        )
        sizes = f"in_capsules={self.in_capsules}, in_dim={self.in_dim}"
        return (
            f"{sizes}, out_capsules={self.out_capsules}, out_dim={self.out_dim}, iterations={self.iterations}{options}"
        )


class PrimaryCapsules(nn.Module):
    """A convolution whose output channels are grouped into capsules, squashed.

    Capsules come in type-major order: all positions of type 0, row by row, then those of type 1, and so on. A plain
    reshape of [B, T·dim, H, W] to [B, -1, dim] would instead mix neighbouring positions of one channel into a vector.

    Args:
        in_channels: channels of the input.
        capsule_types: T, capsule types at every position.
        capsule_dim: D, dimension of a capsule.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution.
        backend: of the squash: None (the best that can run), "reference", "cpp", "cuda" or "triton".
        device: of the parameters.
        dtype: of the parameters.

    Source: Sabour et al. 2017 (arXiv 1710.09829), section 4, layer PrimaryCapsules.
    """

    def __init__(
        self,
        in_channels: int,
        capsule_types: int,
        capsule_dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.capsule_types = _checks.positive_int("capsule_types", capsule_types)
        self.capsule_dim = _checks.positive_int("capsule_dim", capsule_dim)
        self.backend = _checks.backend(backend)
        self.conv = nn.Conv2d(
            _checks.positive_int("in_channels", in_channels),
            self.capsule_types * self.capsule_dim,
            kernel_size,
            stride,
            padding,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """u [B, T·H·W, D] from x [B, C, H_in, W_in]."""
        _checks.shape("x", x, ("B", self.conv.in_channels, "H", "W"), may_be_empty="B")
        features = self.conv(x).unflatten(1, (self.capsule_types, self.capsule_dim))  # [B, T, D, H, W]
        capsules = features.flatten(3).transpose(2, 3).flatten(1, 2)  # [B, T·H·W, D]
        return squash(capsules, backend=self.backend)


class MarginLoss(nn.Module):
    """The margin loss: lengths of present classes above m_plus, of absent ones below m_minus.

    L = Σ_j T_j max(0, m⁺ - |v_j|)² + λ (1 - T_j) max(0, |v_j| - m⁻)², averaged over the batch.

    Args:
        m_plus: m⁺.
        m_minus: m⁻.
        lambda_: λ, the weight of absent classes.

    Source: Sabour et al. 2017 (arXiv 1710.09829), equation 4.
    """

    def __init__(self, m_plus: float = 0.9, m_minus: float = 0.1, lambda_: float = 0.5) -> None:
        super().__init__()
        self.m_plus = m_plus
        self.m_minus = m_minus
        self.lambda_ = lambda_

    def forward(self, v: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar (float32 for 16-bit inputs).

        Args:
            v: [B, J, E], the class capsules.
            target: class indices, long [B], or presences in [0, 1], float [B, J]; rows of zeros are allowed.

        Raises:
            TypeError, ValueError: the target is neither, or an index is out of range.
        """
        _checks.shape("v", v, ("B", "J", "E"), may_be_empty="B")
        present = one_hot_target(target, v.shape[0], v.shape[1])
        length = safe_length(v)  # [B, J]
        hit = present * (self.m_plus - length).clamp(min=0) ** 2
        miss = (1 - present) * (length - self.m_minus).clamp(min=0) ** 2
        return (hit + self.lambda_ * miss).sum(1).mean()

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"m_plus={self.m_plus}, m_minus={self.m_minus}, lambda_={self.lambda_}"


class Decoder(nn.Module):
    """Reconstructs the image from the capsules of the classes present: a regulariser.

    Args:
        out_capsules: J, number of class capsules.
        out_dim: E, their dimension.
        image_shape: (C, H, W) of the images, whose values lie in [0, 1].
        hidden: widths of the two hidden layers.

    Source: Sabour et al. 2017 (arXiv 1710.09829), section 4.1.
    """

    LOSS_WEIGHT = 0.392
    """0.0005 x 784: weighs the mean squared error as the paper weighs the sum over a 28x28 image."""

    def __init__(
        self,
        out_capsules: int,
        out_dim: int,
        image_shape: tuple[int, int, int],
        hidden: tuple[int, int] = (512, 1024),
    ) -> None:
        super().__init__()
        self.out_capsules = _checks.positive_int("out_capsules", out_capsules)
        self.out_dim = _checks.positive_int("out_dim", out_dim)
        self.image_shape = tuple(_checks.positive_int("image_shape", size) for size in image_shape)
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (channels, height, width), got {image_shape}")
        self.layers = nn.Sequential(
            nn.Linear(self.out_capsules * self.out_dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], math.prod(self.image_shape)),
            nn.Sigmoid(),
        )

    def forward(self, v: Tensor, target: Tensor | None = None) -> Tensor:
        """The reconstruction [B, C, H, W].

        Args:
            v: [B, J, E], the class capsules.
            target: the classes to reconstruct, long [B] or float [B, J]; None takes the longest capsule.
        """
        _checks.shape("v", v, ("B", self.out_capsules, self.out_dim), may_be_empty="B")
        if target is None:
            target = v.square().sum(2).argmax(1)
        mask = one_hot_target(target, v.shape[0], v.shape[1]).to(v.dtype)  # [B, J]
        pixels: Tensor = self.layers((v * mask[..., None]).flatten(1))  # [B, C·H·W]
        images: Tensor = pixels.unflatten(1, self.image_shape)
        return images

    def loss(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """0.392 x the mean squared error; at 28x28 that is the paper's 0.0005 x the sum."""
        _checks.shape("images", images, reconstruction.shape)
        return self.LOSS_WEIGHT * nn.functional.mse_loss(reconstruction, images)


def safe_length(v: Tensor) -> Tensor:
    """|v| along the last dimension in at least float32, with gradient 0 where v is 0."""
    square = v.to(torch.promote_types(v.dtype, torch.float32)).square().sum(-1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def one_hot_target(target: Tensor, batch: int, classes: int) -> Tensor:
    """Presences, float [B, J], from class indices, long [B], or presences.

    Raises:
        TypeError, ValueError: the target is neither, or an index is out of range.
    """
    if target.is_floating_point():
        _checks.shape("target", target, (batch, classes))
        return target
    if target.dtype != torch.long:
        raise TypeError(f"target must be class indices (long) or presences (float), got {target.dtype}")
    _checks.shape("target", target, (batch,))
    try:
        return nn.functional.one_hot(target, classes).to(torch.get_default_dtype())
    except RuntimeError as error:
        came = f"{target.min()} to {target.max()}"
        raise ValueError(f"target must hold class indices from 0 to {classes - 1}, got {came}") from error

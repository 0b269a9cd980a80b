"""A network with its preprocessing and loss on a device, and whether it can run there at all."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import caps_kernels
import models
from caps_kernels import BackendError
from models import Model
from training.errors import TrainingError
from training.settings import Settings, shown


@dataclass(frozen=True)
class Learner:
    """A network ready to be trained or asked."""

    model: Model
    network: nn.Module
    device: torch.device
    amp: bool
    channels_last: bool = False

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the scores of one batch.

        Args:
            images: [B, 3, H, W], uint8, on the device.
            targets: [B, classes], float32, on the device.

        Returns:
            The mean loss, [], and the lengths of the class capsules, [B, classes], detached.
        """
        x = self.model.preprocess(images)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            v = self.network(x).float()
            loss = self.model.loss(self.network, x, v, targets)
        return loss, v.detach().norm(dim=-1)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one, the CPU elsewhere.

    Raises:
        TrainingError: there is no such device here.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise TrainingError(f"--device {name}: torch {torch.__version__} sees {gpus} GPUs here")
    return device


def suits_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is known to be faster there: on CPUs with instructions for it, AVX512-BF16 or AMX."""
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def build(settings: Settings, classes: int, device: torch.device) -> Learner:
    """A freshly initialised network, drawn from torch's global generator.

    Raises:
        TrainingError: there is no such model, or it cannot be built for these images.
    """
    # The name may come out of a file.
    if settings.model not in models.names():
        raise TrainingError(f"--model must be one of {', '.join(models.names())}, not {settings.model!r}")
    model = models.get(settings.model)
    try:
        network = model.Network(
            classes,
            settings.image_size,
            iterations=settings.iterations,
            routing_grad=settings.routing_grad,
            backend=settings.backend,
        )
    except ValueError as error:
        raise _unfit(settings, error) from error
    network = network.to(device)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return Learner(model, network, device, settings.amp, settings.channels_last)


def rehearse(settings: Settings, device: torch.device) -> None:
    """Train on two black images, so that what cannot run is refused before the data is made.

    Raises:
        TrainingError: the model cannot take images of this size.
        BackendError: the backend asked for cannot run here.
    """
    learner = build(settings, settings.classes or 2, device)
    images = torch.zeros(2, 3, *settings.image_size, dtype=torch.uint8, device=device)
    targets = torch.zeros(2, settings.classes or 2, device=device)
    try:
        loss, _ = learner.forward(images, targets)
        torch.autograd.backward(loss)
    except (BackendError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError) as error:
        raise _unfit(settings, error) from error


def _unfit(settings: Settings, error: Exception) -> TrainingError:
    return TrainingError(
        f"--model {settings.model} cannot be trained on images of {shown(settings.image_size)}: {error}"
    )


def versions() -> dict[str, str]:
    """What, besides the settings, the bits of a result can depend on."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
        "caps_kernels": caps_kernels.__version__,
        "threads": str(torch.get_num_threads()),
    }

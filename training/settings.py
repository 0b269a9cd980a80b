"""The settings of a run: every flag of `train.py` with its value resolved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from training.errors import TrainingError

ROUTING_GRADS = ("full", "last")
UNBOUND_ON_RESUME = ("workers", "device", "backend")
"""Settings that may change on resume: they say where the same mathematics is computed."""


@dataclass(frozen=True)
class Settings:
    """What a run was asked to do; equal settings on the same CPU give bit-identical weights."""

    data: str
    """"icons" or "rs:FOLDER" with an absolute path."""
    model: str
    image_size: tuple[int, int]
    """Height and width in pixels of the images the data delivers."""
    classes: int | None
    """How many classes were asked for; None leaves it to the data."""
    images_per_class: int | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    iterations: int
    routing_grad: str
    backend: str | None
    """None lets `caps_kernels` choose on the tensors at hand."""
    amp: bool
    channels_last: bool
    """Whether convolutions work on images that lie in memory as [B, H, W, C]."""
    workers: int | None
    """None lets the kind of data decide."""
    seed: int
    device: str
    limit_batches: int | None
    presence_threshold: float
    """A logo counts as present where its class capsule is longer than this."""

    def __post_init__(self) -> None:
        least = {
            "classes": 2,
            "images_per_class": 1,
            "epochs": 1,
            "batch_size": 1,
            "iterations": 1,
            "workers": 0,
            "seed": 0,
            "limit_batches": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise TrainingError(f"{flag(name)} must be at least {bound}, not {value}")
        if self.seed >= 2**63:
            raise TrainingError(f"--seed must be below 2**63, not {self.seed}")
        if min(self.image_size) < 1:
            raise TrainingError(f"--size must be positive, not {shown(self.image_size)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainingError(f"--lr must be positive and finite, not {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise TrainingError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if self.routing_grad not in ROUTING_GRADS:
            raise TrainingError(f"--routing-grad must be {' or '.join(ROUTING_GRADS)}, not {self.routing_grad!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {**asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, stored: object) -> Settings:
        """Settings out of a file, which may hold anything.

        Raises:
            TrainingError: a setting is missing, unknown, of another type or out of range.
        """
        if not isinstance(stored, Mapping):
            raise TrainingError("the settings are not a table of names and values")
        # Runs from before there was a choice had none of it.
        stored = {"channels_last": False, **stored}
        names = {field.name for field in fields(cls)}
        if set(stored) != names:
            odd = sorted(map(str, names.symmetric_difference(stored)))
            raise TrainingError(f"settings missing or unknown: {', '.join(odd)}")
        values = dict(stored)
        for name, value in values.items():
            if not _TYPES[name](value):
                raise TrainingError(f"setting {name} cannot be {value!r}")
        values["image_size"] = tuple(values["image_size"])
        return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_optional_int(value: object) -> bool:
    return value is None or _is_int(value)


def _is_float(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_int, value))


_TYPES = {
    "data": _is_str,
    "model": _is_str,
    "image_size": _is_size,
    "classes": _is_optional_int,
    "images_per_class": _is_optional_int,
    "epochs": _is_int,
    "batch_size": _is_int,
    "lr": _is_float,
    "weight_decay": _is_float,
    "iterations": _is_int,
    "routing_grad": _is_str,
    "backend": lambda value: value is None or _is_str(value),
    "amp": _is_bool,
    "channels_last": _is_bool,
    "workers": _is_optional_int,
    "seed": _is_int,
    "device": _is_str,
    "limit_batches": _is_optional_int,
    "presence_threshold": _is_float,
}


def flag(name: str) -> str:
    """The command-line flag that sets `name`."""
    return "--" + {"image_size": "size"}.get(name, name).replace("_", "-")


def shown(value: object) -> str:
    """A setting's value as it is written on the command line; a size is WIDTHxHEIGHT."""
    if isinstance(value, tuple):
        height, width = value
        return f"{width}x{height}"
    return str(value)


def merge(stored: Settings, given: Mapping[str, Any]) -> Settings:
    """The settings of a resumed run: the stored ones, with what may change taken from `given`.

    Args:
        stored: the settings the run was started with.
        given: the flags given on the command line, by setting name.

    Raises:
        TrainingError: a flag contradicts the run, naming every such flag.
    """
    changed: dict[str, Any] = {}
    contradictions = []
    for name, value in given.items():
        before = getattr(stored, name)
        if value == before:
            continue
        may_change = (
            name in UNBOUND_ON_RESUME
            or (name == "epochs" and value > before)
            # A folder may have moved; that its content is the same is checked once it is read.
            or (name == "data" and before.startswith("rs:") and value.startswith("rs:"))
        )
        if may_change:
            changed[name] = value
        else:
            was = "unset" if before is None else shown(before)
            contradictions.append(f"{flag(name)} {shown(value)} (the run has {was})")
    if contradictions:
        raise TrainingError(
            "--resume continues a run with its own settings; it cannot take "
            f"{', '.join(contradictions)}. Leave that out, or start a new run without --resume. "
            "Only --epochs (more), --workers, --device and --backend may change."
        )
    return replace(stored, **changed)

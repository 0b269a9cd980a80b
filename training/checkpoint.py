"""Checkpoints: everything a run needs to go on bit for bit, in plain tensors and containers."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.errors import TrainingError
from training.run_dir import write_atomically
from training.settings import Settings

FORMAT = "caps_kernels training checkpoint"
VERSION = 1


class CheckpointError(TrainingError):
    """A file is not a usable checkpoint; the message names it and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `batch` batches of the epoch that follows `epoch` whole ones."""

    settings: Settings
    classes: list[str]
    data_fingerprint: str
    """A digest of the data the run saw, so that it does not go on with another."""
    versions: dict[str, str]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    epoch: int
    batch: int
    sums: list[float]
    """The running sums of the unfinished epoch, as `metrics.TrainingSums` keeps them."""
    seconds: tuple[float, float]
    """Training time within the unfinished epoch, and the time of the whole run so far."""
    history: list[dict[str, float]]
    """The rows of metrics.csv."""


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """The content of a checkpoint file."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    content |= {"format": FORMAT, "version": VERSION, "settings": checkpoint.settings.to_dict()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save(checkpoint: Checkpoint, *paths: Path) -> None:
    """Write a checkpoint to each of `paths`, one after the other, each whole or not at all.

    Raises:
        OSError: a file cannot be written.
    """
    content = to_bytes(checkpoint)
    for path in paths:
        write_atomically(path, content)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, trusting nothing in it: no code is executed and every byte is checked.

    Raises:
        CheckpointError: the file is missing, damaged, hostile or something else than a checkpoint.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint written by train.py")
    if content.get("version") != VERSION:
        version = content.get("version")
        raise CheckpointError(f"{path} has version {version!r}; this train.py reads {VERSION}")
    try:
        values = {field.name: content[field.name] for field in fields(Checkpoint)}
        values["settings"] = Settings.from_dict(values["settings"])
        for name, has_type in _TYPES.items():
            if not has_type(values[name]):
                raise TrainingError(f"its {name} is malformed")
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from error
    except TrainingError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    values["seconds"] = tuple(values["seconds"])
    return Checkpoint(**values)


def _read(path: Path) -> object:
    """The content of a torch file, after its checksums were verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores its records as they are: a compressed one could unpack without end.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(f"{path} is not a checkpoint written by train.py")
            # torch does not verify the checksums that it writes.
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: {damaged} fails its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({error})") from error
    # The file decides what goes wrong inside the readers, so nothing narrower is safe.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely ({reason})") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and _is_number(number) for name, number in value.items()
    )


_TYPES: dict[str, Callable[[Any], bool]] = {
    "classes": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "data_fingerprint": lambda v: isinstance(v, str),
    "versions": lambda v: isinstance(v, dict),
    "model": lambda v: isinstance(v, dict),
    "optimizer": lambda v: isinstance(v, dict),
    "rng": lambda v: isinstance(v, dict),
    "epoch": _is_count,
    "batch": _is_count,
    "sums": lambda v: isinstance(v, list) and all(map(_is_number, v)),
    "seconds": lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(_is_number, v)),
    "history": lambda v: isinstance(v, list) and all(map(_is_row, v)),
}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random number generator, in types that a checkpoint may hold."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], position, has_gauss, gauss),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every global random number generator back into a state from `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    array = np.array(keys, dtype=np.uint32)
    np.random.set_state((kind, array, position, has_gauss, cached))  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def check_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that is not one of `optimizer`, which its `load_state_dict` would accept.

    Raises:
        ValueError: something is missing, or a moment has another shape than its parameter.
    """
    own = [set(group) for group in optimizer.param_groups]
    if [set(group) for group in state["param_groups"]] != own:
        raise ValueError("the optimiser state is of another optimiser")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError("the optimiser state is of another optimiser")
        shape = parameters[index].shape
        if any(moments[name].shape != shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError(f"the optimiser state of parameter {index} has a wrong shape")

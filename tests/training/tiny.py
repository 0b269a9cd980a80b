"""A data set and a network that train in a blink, and a server that runs train.py on them.

`python -m tests.training.tiny` imports everything once, then forks a process of its own for every
run it is asked for: real processes to be killed, without seconds of imports for each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logos.splits import DataError, LogoData
from training import learner, plots
from training.run_dir import write_atomically

CLASSES = ("round", "square", "star")
EVENTS: dict[str, int] = {}
"""How often each event has happened in this process."""
_WANTED: dict[str, Any] = {}


def happen(event: str) -> None:
    """Count an event and send this process the signal it was to get there."""
    EVENTS[event] = EVENTS.get(event, 0) + 1
    if _WANTED.get("event") == event and EVENTS[event] == _WANTED["nth"]:
        os.kill(os.getpid(), _WANTED["signal"])


class TinySplit:
    """Images whose brightest channel is their class, under noise; every kind of target occurs."""

    def __init__(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        self.targets: NDArray[np.uint8] = np.zeros((count, len(CLASSES)), np.uint8)
        for row in range(count):
            logos = (row % 5 != 0) + (row % 7 == 0)
            self.targets[row, rng.permutation(len(CLASSES))[:logos]] = 1
        noise = rng.integers(0, 160, (count, 3, 8, 8))
        self.images = (noise + 80 * self.targets[:, :, None, None]).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(self.images[index])
        return image, torch.from_numpy(self.targets[index].astype(np.float32))


class Network(nn.Module):
    """Linear capsules with noise from each global generator, so that resuming must restore all."""

    def __init__(self, classes: int, image_size: tuple[int, int], **_: Any) -> None:
        super().__init__()
        height, width = image_size
        if height < 8:
            raise ValueError("images must be 8 pixels high")
        self.linear = nn.Linear(3 * height * width, classes * 4)
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        happen("train" if self.training else "eval")
        if self.training:
            x = nn.functional.dropout(x, 0.2) * (1 + 0.1 * random.random())
            x = x + 0.1 * float(np.random.rand())  # noqa: NPY002
        s = self.linear(x.flatten(1)).view(len(x), self.classes, 4)
        length = s.norm(dim=-1, keepdim=True)
        v: Tensor = s * length / (1 + length**2)
        return v


def preprocess(images: Tensor) -> Tensor:
    return images.float() / 255


def loss(network: Network, x: Tensor, v: Tensor, target: Tensor) -> Tensor:
    length = v.norm(dim=-1)
    missed = target * (0.9 - length).clamp(min=0) ** 2
    extra = 0.5 * (1 - target) * (length - 0.1).clamp(min=0) ** 2
    total: Tensor = (missed + extra).sum(1).mean()
    return total * float("nan") if _WANTED.get("nan") == EVENTS.get("train") else total


@dataclass(frozen=True)
class Defaults:
    epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 0.01
    weight_decay: float = 0.01
    presence_threshold: float = 0.5
    channels_last: bool = False


TINY = SimpleNamespace(IMAGE_SIZE=(8, 8), Network=Network, preprocess=preprocess, loss=loss, DEFAULTS=Defaults())


def data(spec: str, *, seed: int, **_: Any) -> LogoData:
    happen("load")
    if spec.endswith("missing"):
        raise DataError(f"{spec}: no such folder")
    other = {"other artist": TinySplit(seed + 3, 12)}
    return LogoData(CLASSES, TinySplit(seed + 1, 44), TinySplit(seed + 2, 24), other)


def write_picture(*arguments: Any) -> None:
    write_atomically(arguments[-1], b"a picture")


def install() -> None:
    """Make train.py find the tiny network, the tiny data, and the points to be killed at."""
    import logos
    import models

    vars(models).update(names=lambda: ("tiny",), get=lambda name: TINY)
    vars(logos)["load"] = data
    vars(learner)["suits_bfloat16"] = lambda device: False
    replace = os.replace

    def replace_between_events(source: Any, target: Any) -> None:
        happen("before replace")
        replace(source, target)
        happen("after replace")

    vars(os)["replace"] = replace_between_events
    # Drawing takes longer than everything else together; test_plots.py looks at the pictures.
    vars(plots).update(draw_curves=write_picture, draw_confusion=write_picture)


def _run(request: dict[str, Any], folder: str) -> None:
    """In a forked process: run train.py as asked and leave."""
    import train

    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    os.chdir(folder)
    sys.argv = ["train.py"]
    _WANTED.update(request)
    status = 1
    try:
        status = train.main(request["argv"])
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Answer one JSON request a line: {"argv", "cwd", and "event", "nth", "signal" or "nan"}."""
    install()
    torch.set_num_threads(1)
    # What the first step of a run would import, for seconds.
    import_module("torch._dynamo")
    import_module("train")
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _run(request, request["cwd"])
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    # Pickles and monkeypatches must name this module, not __main__.
    from tests.training import tiny

    tiny.serve()

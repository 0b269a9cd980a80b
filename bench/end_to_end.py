"""Images a second of whole training steps, and what part of a step the capsule layer takes.

`python bench/end_to_end.py` trains each network of models/ on random images with each backend, as train.py does (AdamW,
its batch size), also with the convolutions' tensors in channels_last and under bfloat16 autocast. All variants of a
network take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from bench import machine, report
from bench.clock import Clock
from caps_kernels import backends
from training.learner import suits_bfloat16

CLASSES = 20
VARIANTS = {
    "plain": (False, False),
    "channels_last": (True, False),
    "bfloat16": (False, True),
    "channels_last, bfloat16": (True, True),
}
"""Whether convolutions get channels_last, and whether the step runs under bfloat16 autocast."""


@dataclass
class Step:
    """A training step, ready to be taken again and again."""

    model: str
    backend: str
    variant: str
    batch: int
    device: str
    total: list[float] = field(default_factory=list)
    """Seconds of each timed step."""
    capsules: list[float] = field(default_factory=list)
    """Seconds of its capsule layer, forward and backward."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self._channels_last, self._autocast = VARIANTS[self.variant]
        self._module = models.get(self.model)
        height, width = self._module.IMAGE_SIZE
        self._images = torch.randint(0, 256, (self.batch, 3, height, width), dtype=torch.uint8, device=self.device)
        labels = torch.randint(0, CLASSES, (self.batch,), device=self.device)
        self._targets = nn.functional.one_hot(labels, CLASSES).float()
        self.network = self._module.Network(CLASSES, backend=self.backend).to(self.device)
        if self._channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=self._module.DEFAULTS.learning_rate)
        self._clock = Clock(self.device)
        self._marks: list[Any] = []
        layer: nn.Module = self.network.classes  # type: ignore[assignment]

        def mark(*_: object) -> None:
            self._marks.append(self._clock.mark())

        layer.register_forward_pre_hook(mark)
        layer.register_forward_hook(mark)
        layer.register_full_backward_pre_hook(mark)
        layer.register_full_backward_hook(mark)

    def take(self) -> Tensor:
        """One step: preprocessing, forward, loss, backward, optimizer. Returns the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        x = self._module.preprocess(self._images)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self._autocast):
            v = self.network(x).float()
            loss = self._module.loss(self.network, x, v, self._targets)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def time(self) -> None:
        """One step, timed."""
        self._marks.clear()
        began = self._clock.mark()
        self.take()
        self.total.append(self._clock.seconds(began, self._clock.mark()))
        forward_in, forward_out, backward_in, backward_out = self._marks
        forward = self._clock.seconds(forward_in, forward_out)
        self.capsules.append(forward + self._clock.seconds(backward_in, backward_out))

    def is_default(self) -> bool:
        """Whether train.py does it so on this machine unless told otherwise."""
        wanted = (self._module.DEFAULTS.channels_last, suits_bfloat16(torch.device(self.device)))
        return VARIANTS[self.variant] == wanted and self.backend == backends.available()[0]

    def as_dict(self) -> dict[str, Any]:
        """The medians."""
        seconds, capsules = statistics.median(self.total), statistics.median(self.capsules)
        return {
            "model": self.model,
            "backend": self.backend,
            "variant": self.variant,
            "default": self.is_default(),
            "batch": self.batch,
            "images_per_second": self.batch / seconds,
            "step_ms": 1e3 * seconds,
            "capsule_ms": 1e3 * capsules,
            "capsule_share": capsules / seconds,
        }


def measure(
    model: str, device: str, rounds: int, variants: Sequence[str] = tuple(VARIANTS), batch: int | None = None
) -> list[dict[str, Any]]:
    """Time a network's step with every backend and variant, in turns.

    Args:
        model: a name of `models.names()`.
        device: "cpu" or "cuda".
        rounds: timed steps of each.
        variants: of `VARIANTS`.
        batch: images a step; None is what train.py takes.
    """
    size = batch or models.get(model).DEFAULTS.batch_size
    names = [name for name in backends.PREFERENCE[device] if name in backends.available()]
    steps = [Step(model, backend, variant, size, device) for backend in names for variant in variants]
    for turn in tqdm(range(rounds + 1), desc=model, unit="round", disable=None):
        for step in steps:
            if turn:
                step.time()
            else:
                step.take()
    return [step.as_dict() for step in steps]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people, as Markdown. The gain is over the reference backend's plain step of the same model; a star marks what
    train.py does here unless told otherwise.
    """
    lines = [
        "| model | backend | variant | images/s | gain | step | capsule layer | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [each for each in rows if each["model"] == row["model"]]
        base = next((r for r in same if r["backend"] == "reference" and r["variant"] == "plain"), None)
        gain = f"{row['images_per_second'] / base['images_per_second']:.2f}x" if base is not None else "-"
        name = f"{row['model']} (batch {row['batch']})"
        rates = f"{row['images_per_second']:.0f} | {gain} | {row['step_ms']:.1f} ms | {row['capsule_ms']:.1f} ms"
        variant = row["variant"] + (" *" if row["default"] else "")
        lines.append(f"| {name} | {row['backend']} | {variant} | {rates} | {100 * row['capsule_share']:.0f} % |")
    return "\n".join([*lines, "", "* what train.py does on this machine unless told otherwise"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/end_to_end.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=models.names(), action="append", help="only this one (may be given again)")
    add("--rounds", type=int, default=10, help="timed steps of each variant (default 10)")
    add("--threads", type=int, help=f"of torch (here {torch.get_num_threads()} by default)")
    add("--json", type=Path, metavar="FILE", help="write every number to FILE")
    given = parser.parse_args(argv)
    if given.rounds < 1 or (given.threads is not None and given.threads < 1):
        parser.error("--rounds and --threads must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and machine.heap() != "warm" and sys.platform == "linux":
        machine.restart_with_warm_heap(Path(__file__).resolve())
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    about = machine.describe(device)
    print("\n".join(f"{name:<13} {value}" for name, value in about.items()), "\n", flush=True)
    rows = [row for model in given.model or models.names() for row in measure(model, device, given.rounds)]
    print(table(rows))
    if given.json is not None:
        report.write_json(given.json, {"machine": about, "steps": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

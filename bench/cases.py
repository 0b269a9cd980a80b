"""What is measured: the shapes of the target tables, and sweeps around one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One call of a public function, by its sizes and options; see CONTRIBUTING.md for the letters."""

    name: str
    op: str = "dense_capsules"
    batch: int = 128
    in_capsules: int = 1152
    out_capsules: int = 10
    in_dim: int = 8
    out_dim: int = 16
    iterations: int = 3
    positions: int = 1
    bias: bool = False
    leaky: bool = False
    routing_grad: str = "full"
    dtype: str = "float32"
    peers: bool = True
    """Run plain PyTorch too. Off where the comparison is with this project's own plain call."""
    compile: bool = False
    """Run torch.compile of the peers too; it takes a minute or so to compile."""
    extras: tuple[str, ...] = ()
    """Further ways to run backend "cpp": "1 thread", or an instruction set such as "v3"."""
    beside: str = ""
    """The name of another case, of which this project's best backend takes part in the rounds: for a target that
    compares the two."""
    memory: bool = False
    """Measure peak memory."""
    quick: bool = False
    """Part of --quick."""

    def __str__(self) -> str:
        return f"{self.name}: {self.sizes}"

    @property
    def sizes(self) -> str:
        """The sizes and whatever differs from the defaults, in words."""
        text = f"B{self.batch} I{self.in_capsules} J{self.out_capsules}"
        if self.op in ("dense_capsules", "predict_votes"):
            text += f" D{self.in_dim}"
        text += f" E{self.out_dim}"
        if self.op in ("dense_capsules", "dynamic_routing"):
            text += f" R{self.iterations}"
        words = [f"P{self.positions}"] if self.positions > 1 else []
        words += [word for word, on in (("bias", self.bias), ("leaky", self.leaky)) if on]
        words += ["routing_grad=last"] if self.routing_grad == "last" else []
        words += [self.dtype] if self.dtype != "float32" else []
        return " ".join([self.op if self.op != "dense_capsules" else "", text, *words]).strip()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the inputs."""
        return DTYPES[self.dtype]

    @property
    def votes(self) -> int:
        """N, the number of elements of û."""
        return self.batch * self.in_capsules * self.out_capsules * self.out_dim

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public function."""
        if self.op == "squash":
            return {}
        if self.op == "predict_votes":
            return {"positions": self.positions}
        routing = {"iterations": self.iterations, "leaky": self.leaky, "routing_grad": self.routing_grad}
        return routing if self.op == "dynamic_routing" else {**routing, "positions": self.positions}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the inputs, in the public function's order."""
        b, i, j, d, e = self.batch, self.in_capsules, self.out_capsules, self.in_dim, self.out_dim
        if self.op == "squash":
            return {"s": (b, i, j, e)}
        if self.op == "dynamic_routing":
            shapes: dict[str, tuple[int, ...]] = {"votes": (b, i, j, e)}
        else:
            shapes = {"u": (b, i, d), "weight": (i // self.positions, j, d, e)}
        return {**shapes, "bias": (j, e)} if self.bias else shapes

    def output_shape(self) -> tuple[int, ...]:
        """Of the result."""
        whole = (self.batch, self.in_capsules, self.out_capsules, self.out_dim)
        return whole if self.op in ("squash", "predict_votes") else (self.batch, self.out_capsules, self.out_dim)

    def inputs(self, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """Inputs of the size they have in a freshly made `CapsuleLayer`, so that couplings are neither flat nor 0/1."""
        generator = torch.Generator(device).manual_seed(seed)
        weight_std = 0.55 * self.out_capsules / math.sqrt(self.in_capsules * self.out_dim * math.sqrt(self.in_dim))
        std = {"s": 1.0, "u": self.in_dim**-0.25, "weight": weight_std, "bias": 0.1}
        std["votes"] = weight_std * self.in_dim**0.25
        tensors = []
        for name, shape in self.shapes().items():
            tensor = torch.empty(shape, dtype=self.torch_dtype, device=device)
            # In place: a second copy of a weight of 4 GB would be in the way.
            tensors.append(tensor.normal_(0, std[name], generator=generator).requires_grad_())
        return tensors

    def grad_output(self, device: str = "cpu", seed: int = 1) -> Tensor:
        """A gradient of the result to start the backward from."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(self.output_shape(), dtype=self.torch_dtype, device=device).normal_(generator=generator)

    def tiny(self) -> Case:
        """The same call at sizes that cost nothing, for warming up."""
        positions = min(2, self.positions)
        return replace(self, batch=min(2, self.batch), in_capsules=4, out_capsules=3, positions=positions)

    def flop(self) -> dict[str, float]:
        """FLOP of the method that makes û again in every pass, a multiply-add being 2, without exponentials.

        The first softmax is uniform, so that Σ_i û_ij is one product without û. A method that keeps û does less than
        this, so its rate against this count may exceed what the arithmetic units did.
        """
        n, nd, r = float(self.votes), float(self.votes) * self.in_dim, self.iterations
        if self.op == "squash":
            forward, backward = 5 * n, 10 * n
        elif self.op == "predict_votes":
            forward, backward = 2 * nd, 4 * nd
        elif self.op == "dynamic_routing":
            forward, backward = 2 * n * (2 * r - 1), 2 * n * (5 * r - 4)
        else:
            forward = 2 * nd * r + 4 * n * (r - 1)
            if self.routing_grad == "last":
                backward = 2 * nd + 4 * n + 4 * nd
            else:
                backward = 2 * nd * (r - 1) + 2 * n * (5 * r - 4) + 4 * nd
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def least_bytes(self) -> dict[str, float]:
        """Bytes moved if every input, saved tensor, output and gradient went through memory once."""
        size = self.torch_dtype.itemsize
        inputs = size * sum(math.prod(shape) for shape in self.shapes().values())
        output = size * math.prod(self.output_shape())
        routed = self.op in ("dynamic_routing", "dense_capsules")
        saved = max(4, size) * self.iterations * math.prod(self.output_shape()) if routed else 0
        forward, backward = float(inputs + output), float(2 * inputs + output + saved)
        return {"forward": forward, "backward": backward, "both": forward + backward + saved}


MAIN = Case("main", compile=True, extras=("1 thread", "v3"), memory=True, quick=True)

TARGETS = (
    MAIN,
    replace(MAIN, name="one-sample", batch=1, extras=(), memory=False, quick=True),
    Case("convolutional", batch=320, in_capsules=288, out_capsules=32, in_dim=16, compile=True, extras=("v3",)),
    Case("59-classes", batch=16, out_capsules=59, compile=True),
    Case("large", batch=32, in_capsules=18432, out_capsules=32, compile=True),
    Case("E12-D6", in_dim=6, out_dim=12, beside="main"),
    Case("E21-D9", in_dim=9, out_dim=21, beside="main"),
    Case("leaky", leaky=True, peers=False, beside="main"),
    Case("bias", bias=True, peers=False, beside="main"),
    Case("last", routing_grad="last", peers=False, beside="main"),
    Case("shared", positions=36, peers=False, beside="main"),
    Case("bfloat16", dtype="bfloat16", beside="main"),
    Case("float64", dtype="float64", beside="main"),
    Case("predict-votes", op="predict_votes", quick=True),
    Case("dynamic-routing", op="dynamic_routing", quick=True),
    Case("squash", op="squash", quick=True),
    Case("180x100", batch=16, in_capsules=135168, out_capsules=59),
)
"""Every shape a target speaks of, in the order they are run."""


def _sweep(letter: str, field: str, values: tuple[int, ...], **options: Any) -> tuple[Case, ...]:
    sizes: list[dict[str, Any]] = [{field: value} for value in values]
    return tuple(Case(f"sweep-{letter}{size[field]}", **size, **options) for size in sizes)


_BY_AXIS = (
    _sweep("B", "batch", (4, 15, 16, 17, 32, 64, 256)),
    _sweep("I", "in_capsules", (36, 288, 4608, 9216), memory=True),
    _sweep("J", "out_capsules", (1, 2, 32, 59, 128)),
    _sweep("R", "iterations", (1, 2, 5, 10)),
    _sweep("E", "out_dim", (4, 8, 32)),
)
SWEEPS = tuple(case for turn in zip_longest(*_BY_AXIS) for case in turn if case is not None)
"""One size at a time, around `MAIN`; by turns, so that a run cut short has some of each."""

CASES = (*TARGETS, *SWEEPS)

AXES = {
    "B": ("batch", "samples B"),
    "I": ("in_capsules", "lower capsules I"),
    "J": ("out_capsules", "higher capsules J"),
    "R": ("iterations", "iterations R"),
    "E": ("out_dim", "dimension E"),
}


def select(pattern: str = "", *, quick: bool = False) -> list[Case]:
    """The cases whose name or sizes contain `pattern`, in order; with `quick` a few. Upper case is lower case here."""
    wanted = pattern.lower()
    return [case for case in CASES if wanted in str(case).lower() and (case.quick or not quick)]


def named(name: str) -> Case:
    """The case of a name.

    Raises:
        ValueError: there is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"case must be one of {', '.join(case.name for case in CASES)}, got {name!r}")


def on_axis(letter: str) -> list[Case]:
    """`MAIN` and the sweep over one of `AXES`, by size."""
    field = AXES[letter][0]
    swept = [case for case in SWEEPS if case.name.startswith(f"sweep-{letter}")]
    return sorted([MAIN, *swept], key=lambda case: int(getattr(case, field)))

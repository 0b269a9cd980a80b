"""Sample inputs of every op, shared by all tests of all backends and by the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caps_kernels import functional

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call of a public function: its tensors' shapes and its options."""

    op: str
    name: str
    shapes: Mapping[str, Shape]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(functional, self.op)
        return function

    def inputs(
        self,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        *,
        seed: int = 0,
        permuted: bool = False,
        requires_grad: bool = True,
    ) -> list[Tensor]:
        """Random tensors of the case's shapes, the same numbers in every dtype and with any strides.

        Args:
            dtype: of the tensors; the numbers are drawn in float64.
            device: of the tensors.
            seed: of the numbers.
            permuted: give every tensor strides of reversed order and a gap between its elements.
            requires_grad: whether they require gradients.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for shape in self.shapes.values():
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            if permuted:
                tensor = with_gaps(tensor)
            tensors.append(tensor.requires_grad_(requires_grad))
        return tensors

    def call(self, tensors: Sequence[Tensor], backend: str | None = None, **options: Any) -> Any:
        """The public function's result for tensors in the order of `shapes`."""
        named = dict(zip(self.shapes, tensors, strict=True))
        return self.function(**named, **{**self.options, **options}, backend=backend)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers with strides in reversed order and every second element of memory unused."""
    reversed_shape = [*tensor.shape[::-1], 2]
    memory = torch.full(reversed_shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = memory[..., 0].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


def squash(name: str, *shape: int, dim: int = -1) -> Case:
    """A case of `squash`."""
    return Case("squash", name, {"s": shape}, {"dim": dim})


def predict_votes(name: str, b: int, i: int, j: int, d: int, e: int, positions: int = 1) -> Case:
    """A case of `predict_votes` with sizes B, I, J, D, E."""
    shapes = {"u": (b, i, d), "weight": (i // positions, j, d, e)}
    return Case("predict_votes", name, shapes, {"positions": positions})


def dynamic_routing(name: str, b: int, i: int, j: int, e: int, *, bias: bool = False, **options: Any) -> Case:
    """A case of `dynamic_routing` with sizes B, I, J, E."""
    shapes: dict[str, Shape] = {"votes": (b, i, j, e)}
    return Case("dynamic_routing", name, {**shapes, "bias": (j, e)} if bias else shapes, options)


def dense_capsules(
    name: str, b: int, i: int, j: int, d: int, e: int, *, positions: int = 1, bias: bool = False, **options: Any
) -> Case:
    """A case of `dense_capsules` with sizes B, I, J, D, E."""
    shapes: dict[str, Shape] = {"u": (b, i, d), "weight": (i // positions, j, d, e)}
    if bias:
        shapes["bias"] = (j, e)
    return Case("dense_capsules", name, shapes, {"positions": positions, **options})


CASES = (
    squash("last", 3, 4, 5),
    squash("first", 4, 3, dim=0),
    squash("middle", 2, 5, 3, 2, dim=-3),
    squash("vector", 7),
    squash("one", 3, 1),
    squash("empty", 0, 4),
    predict_votes("plain", 3, 4, 2, 3, 5),
    predict_votes("shared", 2, 6, 3, 2, 4, positions=3),
    predict_votes("ones", 1, 1, 1, 1, 1),
    predict_votes("empty", 0, 4, 2, 3, 5),
    dynamic_routing("plain", 2, 5, 3, 4),
    dynamic_routing("bias", 3, 4, 2, 3, bias=True, iterations=2),
    dynamic_routing("leaky", 2, 4, 3, 2, leaky=True),
    dynamic_routing("last", 2, 4, 3, 5, bias=True, routing_grad="last"),
    dynamic_routing("one-iteration", 2, 3, 2, 2, iterations=1),
    dynamic_routing("ten-iterations", 1, 3, 2, 2, bias=True, iterations=10),
    dynamic_routing("one-parent", 2, 3, 1, 3),
    dynamic_routing("one-parent-leaky", 2, 3, 1, 3, leaky=True),
    dynamic_routing("one-child", 2, 1, 3, 2),
    dynamic_routing("empty", 0, 4, 3, 2, bias=True),
    dense_capsules("plain", 2, 5, 3, 2, 4),
    dense_capsules("bias", 3, 4, 2, 3, 3, bias=True),
    dense_capsules("shared", 2, 6, 3, 2, 3, positions=3),
    dense_capsules("leaky", 2, 4, 3, 2, 2, leaky=True, bias=True),
    dense_capsules("last", 2, 4, 3, 3, 2, routing_grad="last", bias=True),
    dense_capsules("one-iteration", 2, 3, 2, 2, 2, iterations=1),
    dense_capsules("five-iterations", 1, 4, 2, 2, 3, iterations=5),
    dense_capsules("everything", 2, 6, 3, 3, 2, positions=2, bias=True, leaky=True, iterations=2),
    dense_capsules("ones", 1, 1, 1, 1, 1),
    dense_capsules("empty", 0, 4, 3, 2, 2, bias=True),
)
SMOKE = tuple(case for case in CASES if case.name in ("plain", "everything", "last"))
"""A few cases that between them use every op and option, for checks that take seconds each."""

"""Who takes part in a case: this project's backends and the baselines, each ready to be called, or why it is not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench import machine, peers
from bench.cases import Case
from bench.clock import Clock
from caps_kernels import _extension, backends, functional

QUANTITIES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Limits:
    """Beyond these a contender is not run, or not run on."""

    seconds: float = 30.0
    """Of one call."""
    bytes: float = 12 * 2**30
    """Of one call's peak memory above its inputs, as estimated."""

    @staticmethod
    def here(seconds: float = 30.0, gib: float | None = None, device: str = "cpu") -> Limits:
        """The given limits, and never more than 70 % of the device's memory that is free now."""
        free = 0.7 * machine.available_memory(device)
        return Limits(seconds, min(free, 12 * 2**30 if gib is None else gib * 2**30))

    def reason(self, seconds: float, size: float) -> str | None:
        """Why a call of this cost is not made, or None."""
        if size > self.bytes:
            return f"over {self.bytes / 2**30:.0f} GiB (about {size / 2**30:.0f})"
        if seconds > self.seconds:
            return f"over {self.seconds:.0f} s (about {seconds:.0f})"
        return None


@dataclass
class Contender:
    """A way to compute a case, ready to be called."""

    name: str
    inputs: list[Tensor]
    function: Callable[[], Tensor]
    ours: bool
    weight_layout: str = "ijde"
    regime: str = ""
    """Which of its kernels runs, as the backend tells."""
    around: Callable[[], AbstractContextManager[object]] = field(default=contextlib.nullcontext)
    """Entered around calls, outside of the timing."""
    refused: dict[str, str] = field(default_factory=dict)
    """Quantities that are over a limit, and which."""
    case: str = ""
    """The case it computes, if that is another than the one it takes part in."""

    def gradients(self, output: Tensor, grad_output: Tensor) -> list[Tensor]:
        """Of all inputs, the weight's in the layout it is stored in."""
        return list(torch.autograd.grad(output, self.inputs, grad_output))

    def in_order(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The same with the weight's as [I, J, D, E]."""
        if self.weight_layout == "ijde":
            return list(gradients)
        return [gradients[0], peers.from_layout(gradients[1], self.weight_layout), *gradients[2:]]


@dataclass(frozen=True)
class Absent:
    """A contender that does not take part."""

    name: str
    reason: str


def build(
    case: Case,
    inputs: list[Tensor],
    limits: Limits,
    *,
    compiled: bool = True,
    only: Sequence[str] = (),
    choose_layout: bool = True,
) -> tuple[list[Contender], list[Absent]]:
    """Everyone who takes part in a case, and who does not and why.

    Args:
        case: what is computed.
        inputs: of the case, made by `Case.inputs`.
        limits: against estimates of a call's cost.
        compiled: let torch.compile take part where the case has it.
        only: names to keep; empty keeps all.
        choose_layout: find the baselines' fastest layout of W, which makes calls; otherwise take the first.
    """
    found: list[Contender | Absent] = [*_backends(case, inputs, limits)]
    if case.peers and not (only and all(name in backends.BACKENDS for name in only)):
        found += _baselines(case, inputs, limits, compiled and case.compile, only, choose_layout)
    kept = [contender for contender in found if not only or contender.name in only]
    present = [contender for contender in kept if isinstance(contender, Contender)]
    return present, [contender for contender in kept if isinstance(contender, Absent)]


def best_of(case: Case, limits: Limits, device: str) -> Contender | None:
    """This project's best backend on another case, to take part in one; None where none runs."""
    for found in _backends(replace(case, extras=()), case.inputs(device), limits):
        if isinstance(found, Contender) and not found.refused:
            return replace(found, name=f"{found.name} of {case.name}", case=case.name)
    return None


def _backends(case: Case, inputs: list[Tensor], limits: Limits) -> Iterator[Contender | Absent]:
    function = getattr(functional, case.op)
    named = dict(zip(case.shapes(), inputs, strict=True))
    for verdict in backends.explain(case.op, **named, **case.options):
        name = verdict.backend
        if verdict.reason is not None:
            if name in backends.available():
                yield Absent(name, verdict.reason)
            continue

        def call(name: str = name) -> Tensor:
            result: Tensor = function(**named, **case.options, backend=name)
            return result

        contender = Contender(name, inputs, call, ours=True, regime=verdict.regime or "")
        if name == "reference":
            votes = 4.0 * case.votes * max(1, case.torch_dtype.itemsize // 4)
            _refuse(contender, limits, 2 * votes, 5 * votes)
        else:
            _refuse(contender, limits, *_least_memory(case))
        if "forward" in contender.refused:
            yield Absent(name, contender.refused["forward"])
            continue
        yield contender
        if name == "cpp" and not contender.refused:
            yield from _extras(case, contender)


def _least_memory(case: Case) -> tuple[float, float]:
    """What the results of forward and of both take at least, and 64 MiB of scratch."""
    size = case.torch_dtype.itemsize
    output = size * math.prod(case.output_shape())
    gradients = size * sum(math.prod(shape) for shape in case.shapes().values())
    return 2**26 + output, 2**26 + output + gradients


def _extras(case: Case, plain: Contender) -> Iterator[Contender | Absent]:
    for extra in case.extras:
        name = f"{plain.name}, {extra}"
        if extra == "1 thread":
            yield Contender(name, plain.inputs, plain.function, ours=True, around=lambda: threads(1))
            continue
        # An installation may be of a time before instruction sets could be forced.
        names: list[str] = getattr(_extension, "isa_names", list)()
        if extra not in names:
            yield Absent(name, f"this processor runs {', '.join(names) or 'none of them'}")
        elif extra != names[-1]:
            yield Contender(name, plain.inputs, plain.function, ours=True, around=_forcing(extra))


def _forcing(isa: str) -> Callable[[], AbstractContextManager[object]]:
    force = vars(_extension)["force_isa"]
    return lambda: force(isa)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with `count` threads during a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _baselines(
    case: Case, inputs: list[Tensor], limits: Limits, compiled: bool, only: Sequence[str], choose_layout: bool
) -> Iterator[Contender | Absent]:
    # What earlier cases compiled would otherwise count against the limit of recompilations.
    torch.compiler.reset()
    size = case.torch_dtype.itemsize
    for peer in peers.of_op(case.op):
        names = (peer.name, f"compile {peer.name}")
        if only and not any(name in only for name in names):
            continue
        costs = [peer.bytes(size * case.votes, case.in_dim, backward=backward) for backward in (False, True)]
        plain = Contender(peer.name, inputs, lambda: inputs[0], ours=False)
        _refuse(plain, limits, costs[0], costs[1])
        if "forward" in plain.refused:
            reason = plain.refused["forward"]
            yield Absent(peer.name, reason)
            if compiled and peer.name in peers.EAGER:
                yield Absent(names[1], reason)
            continue
        dense = "weight" in case.shapes()
        layout = (fastest_layout(peer, case, inputs) if choose_layout else peer.layouts[0]) if dense else "ijde"
        plain.weight_layout = layout
        arranged = arrange(inputs, layout)
        function = peer.function(case.op, case.iterations, layout)
        yield _over(plain, function, arranged)
        if compiled and peer.name in peers.EAGER:
            fused = torch.compile(function, dynamic=False)
            twin = Contender(names[1], inputs, plain.function, ours=False, weight_layout=layout)
            twin.refused = dict(plain.refused)
            yield _over(twin, fused, arranged)


def _over(contender: Contender, function: Callable[..., Tensor], tensors: list[Tensor]) -> Contender:
    contender.inputs = tensors
    contender.function = lambda: function(*tensors)
    return contender


def _refuse(contender: Contender, limits: Limits, forward: float, both: float) -> None:
    for quantity, size in zip(QUANTITIES, (forward, both, both), strict=True):
        reason = limits.reason(0, size)
        if reason is not None:
            contender.refused[quantity] = reason


def arrange(inputs: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The inputs with the weight, the second, stored in `layout`; the tensors themselves where nothing changes."""
    if layout == "ijde":
        return list(inputs)
    return [inputs[0], peers.to_layout(inputs[1], layout), *inputs[2:]]


LAYOUT_BYTES = 2**27
"""û of the samples on which layouts are compared."""


def fastest_layout(peer: peers.Peer, case: Case, inputs: Sequence[Tensor]) -> str:
    """The layout of W with which forward and backward of a baseline are fastest: the best of three calls each."""
    clock = Clock(inputs[0].device.type)
    a_sample = case.torch_dtype.itemsize * case.votes / case.batch
    samples = max(1, min(case.batch, int(LAYOUT_BYTES / a_sample)))
    best = {}
    for layout in peer.layouts:
        u = inputs[0][:samples].detach().requires_grad_()
        _, weight = arrange(inputs, layout)[:2]
        function = peer.function(case.op, case.iterations, layout)
        seconds = []
        for _ in range(3):
            began = clock.mark()
            output = function(u, weight)
            torch.autograd.grad(output, (u, weight), torch.ones_like(output))
            seconds.append(clock.seconds(began, clock.mark()))
        best[layout] = min(seconds)
    return min(best, key=lambda layout: best[layout])

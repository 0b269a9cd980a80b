"""Correctness first, then time: interleaved rounds in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import exact
from bench.cases import Case, named
from bench.clock import Clock
from bench.contenders import Contender, Limits, best_of, build

TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 5e-2}
"""Max-norm relative error against float64 beyond which a result is wrong, for everyone alike."""
SAMPLE_SECONDS = 0.005
"""A timed sample lasts at least about this long: shorter calls are repeated within it."""
ROUNDS = (3, 25)
"""Fewest and most rounds of a case."""


@dataclass
class Times:
    """Seconds of a call, from several rounds."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """The time below which `share` of the samples lie."""
        ordered = sorted(self.samples)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    def as_dict(self) -> dict[str, float]:
        """Median, 20 % and 80 %, and how many samples."""
        return {
            "median": self.median,
            "p20": self.quantile(0.2),
            "p80": self.quantile(0.8),
            "samples": len(self.samples),
        }


@dataclass
class Outcome:
    """What came of one contender in one case."""

    name: str
    ours: bool
    regime: str = ""
    layout: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    """Max-norm relative errors against float64, by tensor ("output", "grad u", ...)."""
    times: dict[str, Times] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Why there is no time, by quantity."""
    case: str = ""
    """The case it computed, if another than that of the round."""

    def seconds(self, quantity: str) -> float | None:
        """The median, or None where there is none."""
        times = self.times.get(quantity)
        return times.median if times is not None and times.samples else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        times = {quantity: found.as_dict() for quantity, found in self.times.items() if found.samples}
        return {**vars(self), "times": times}


def run_case(
    case: Case,
    limits: Limits,
    budget: float,
    *,
    device: str = "cpu",
    compiled: bool = True,
    only: Sequence[str] = (),
) -> list[Outcome]:
    """Check and time everyone in a case.

    Args:
        case: what is computed.
        limits: of one call.
        budget: seconds for the timing; at least `ROUNDS[0]` rounds are made even so.
        device: "cpu" or "cuda".
        compiled: let torch.compile take part where the case has it.
        only: names of the contenders to keep; empty keeps all.
    """
    inputs, grad_output = case.inputs(device), case.grad_output(device)
    present, absent = build(case, inputs, limits, compiled=compiled, only=only)
    outcomes = {
        contender.name: Outcome(contender.name, contender.ours, contender.regime, contender.weight_layout)
        for contender in present
    }
    check(case, present, outcomes, grad_output)
    starts = {contender.name: grad_output for contender in present}
    other = named(case.beside) if case.beside and not only else None
    beside = best_of(other, limits, device) if other is not None else None
    if other is not None and beside is not None:
        outcomes[beside.name] = Outcome(beside.name, beside.ours, beside.regime, case=other.name)
        starts[beside.name] = other.grad_output(device)
        check(other, [beside], outcomes, starts[beside.name])
        present.append(beside)
    _time(present, outcomes, starts, limits, budget, Clock(device))
    missing = [Outcome(each.name, False, failed=dict.fromkeys(("forward", "both"), each.reason)) for each in absent]
    return [*outcomes.values(), *missing]


def check(case: Case, present: Sequence[Contender], outcomes: dict[str, Outcome], grad_output: Tensor) -> None:
    """Hold everyone against float64; those that are wrong get no time and are said to be wrong."""
    if not present:
        return
    masked = exact.mask(case, grad_output)
    canonical = next((each.inputs for each in present if each.weight_layout == "ijde"), None)
    right = exact.solve(case, canonical or _canonical(present[0]), masked)
    for contender in present:
        outcome = outcomes[contender.name]
        try:
            outcome.errors = errors(case, contender, right, masked)
        except (RuntimeError, MemoryError) as error:
            outcome.failed = dict.fromkeys(("forward", "both"), f"failed: {str(error).strip().splitlines()[0]}")
            continue
        for quantity, reason in contender.refused.items():
            outcome.failed[quantity] = reason
        worst = max(outcome.errors.values(), default=0.0)
        if not worst <= TOLERANCES[case.dtype]:
            outcome.failed = dict.fromkeys(("forward", "both"), f"wrong: error {worst:.1e}")


def _canonical(contender: Contender) -> list[Tensor]:
    """Its inputs with the weight as [I, J, D, E]."""
    return contender.in_order([tensor.detach() for tensor in contender.inputs])


def errors(case: Case, contender: Contender, right: exact.Exact, masked: Tensor) -> dict[str, float]:
    """Errors of a contender's output and gradients, without the gradients where only the forward fits."""
    with contender.around():
        if "both" in contender.refused:
            with torch.no_grad():
                output = contender.function()
            return {"output": exact.relative(output[right.samples], right.output)}
        output = contender.function()
        gradients = contender.in_order(contender.gradients(output, masked))
    found = {"output": exact.relative(output[right.samples], right.output)}
    names = [f"grad {name}" for name in case.shapes()]
    return {**found, **dict(zip(names, right.gradient_errors(gradients), strict=True))}


def sample(contender: Contender, quantity: str, grad_output: Tensor, clock: Clock, repeats: int) -> dict[str, float]:
    """Seconds a call: of the forward under no_grad, or of forward and backward with the backward's share.

    Args:
        contender: who is called.
        quantity: "forward" or "both".
        grad_output: where the backward starts.
        clock: of the device.
        repeats: calls the mean is taken over.
    """
    if quantity == "forward":
        with torch.no_grad():
            began = clock.mark()
            for _ in range(repeats):
                contender.function()
            return {"forward": clock.seconds(began, clock.mark()) / repeats}
    marks = []
    for _ in range(repeats):
        began = clock.mark()
        output = contender.function()
        between = clock.mark()
        contender.gradients(output, grad_output)
        marks.append((began, between, clock.mark()))
    backward = sum(clock.seconds(between, ended) for _, between, ended in marks)
    return {"backward": backward / repeats, "both": clock.seconds(marks[0][0], marks[-1][2]) / repeats}


def _time(
    present: Sequence[Contender],
    outcomes: dict[str, Outcome],
    starts: dict[str, Tensor],
    limits: Limits,
    budget: float,
    clock: Clock,
) -> None:
    pairs = [(c, q) for q in ("forward", "both") for c in present if q not in outcomes[c.name].failed]
    repeats: dict[tuple[str, str], int] = {}
    for contender, quantity in list(pairs):
        outcome = outcomes[contender.name]
        with contender.around():
            # The first call under no_grad compiles; only the second is one to judge by.
            sample(contender, quantity, starts[contender.name], clock, 1)
            first = sample(contender, quantity, starts[contender.name], clock, 1)[quantity]
        if first > limits.seconds:
            outcome.failed[quantity] = f"over {limits.seconds:.0f} s ({first:.0f})"
            pairs.remove((contender, quantity))
            continue
        repeats[contender.name, quantity] = max(1, round(SAMPLE_SECONDS / max(first, 1e-7)))
    gc.collect()
    gc.disable()
    try:
        ends = time.monotonic() + budget
        for done in range(ROUNDS[1]):
            if done >= ROUNDS[0] and time.monotonic() > ends:
                break
            for contender, quantity in pairs:
                count, start = repeats[contender.name, quantity], starts[contender.name]
                with contender.around():
                    if count > 1:  # caches as a loop of calls finds them
                        sample(contender, quantity, start, clock, 1)
                    found = sample(contender, quantity, start, clock, count)
                for name, seconds in found.items():
                    outcomes[contender.name].times.setdefault(name, Times()).samples.append(seconds)
    finally:
        gc.enable()

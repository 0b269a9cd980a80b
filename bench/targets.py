"""The bar: ratios on a warm heap, AVX-512, two cores, through the public function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.cases import named
from bench.ceilings import Ceilings
from bench.measure import Outcome
from bench.peers import EAGER

OURS = ("cuda", "triton", "cpp", "reference")
"""Backends, the best first: the first one with a time is who a target speaks of."""


@dataclass
class Record:
    """Everything measured of a run that targets need."""

    outcomes: Mapping[str, Sequence[Outcome]]
    """By case."""
    peaks: Mapping[str, Mapping[str, Mapping[str, int | str]]]
    """Bytes or a reason, by case, contender and quantity."""
    ceilings: Ceilings

    def seconds(self, case: str, who: str, quantity: str) -> float | None:
        """The median time of a contender, of "ours", of "eager", of "compile", or of our plain call "beside" it; None
        where there is none.
        """
        found = {outcome.name: outcome.seconds(quantity) for outcome in self.outcomes.get(case, ())}
        if who == "beside":
            return next((o.seconds(quantity) for o in self.outcomes.get(case, ()) if o.case), None)
        if who == "ours":
            return next((found[name] for name in OURS if found.get(name) is not None), None)
        group = {"eager": EAGER, "compile": tuple(f"compile {name}" for name in EAGER)}.get(who, (who,))
        times = [seconds for name in group if (seconds := found.get(name)) is not None]
        return min(times, default=None)

    def ratio(self, over: tuple[str, str, str], under: tuple[str, str, str]) -> float | None:
        """One time over another, each given as (case, who, quantity)."""
        numerator, denominator = self.seconds(*over), self.seconds(*under)
        return numerator / denominator if numerator is not None and denominator else None

    def share(self, case: str, quantity: str) -> float | None:
        """Our share of the FMA peak."""
        seconds = self.seconds(case, "ours", quantity)
        return named(case).flop()[quantity] / seconds / 1e9 / self.ceilings.fma if seconds else None

    def memory(self, case: str, quantity: str) -> float | None:
        """How many times less memory than einsum ours takes at its peak."""
        peaks = self.peaks.get(case, {})
        ours = next((peaks[name].get(quantity) for name in OURS if name in peaks), None)
        einsum = peaks.get("einsum", {}).get(quantity)
        return einsum / max(1, ours) if isinstance(ours, int) and isinstance(einsum, int) else None


@dataclass(frozen=True)
class Target:
    """A number to reach."""

    what: str
    must: float
    aim: float
    measured: Callable[[Record], float | None]
    at_most: bool = False
    """Whether smaller is better."""

    def met(self, value: float) -> bool:
        """Whether `value` reaches `must`."""
        return value <= self.must if self.at_most else value >= self.must


def _against(what: str, case: str, who: str, quantity: str, must: float, aim: float) -> Target:
    return Target(what, must, aim, lambda run: run.ratio((case, who, quantity), (case, "ours", quantity)))


def _share(what: str, case: str, quantity: str, must: float, aim: float) -> Target:
    return Target(what, must, aim, lambda run: run.share(case, quantity))


def _memory(what: str, quantity: str, must: float, aim: float) -> Target:
    return Target(what, must, aim, lambda run: run.memory("main", quantity))


def _relative_share(case: str, must: float, aim: float) -> Target:
    def measured(run: Record) -> float | None:
        faster = run.ratio((case, "beside", "both"), (case, "ours", "both"))
        return None if faster is None else faster * named(case).flop()["both"] / named("main").flop()["both"]

    return Target(f"{case}, forward + backward: share of FMA peak against that of E16", must, aim, measured)


def _option(case: str) -> Target:
    return Target(
        f"{case}, forward + backward: time against plain",
        1.15,
        1.0,
        lambda run: run.ratio((case, "ours", "both"), (case, "beside", "both")),
        at_most=True,
    )


def _avx2(case: str, must: float, aim: float) -> Target:
    return Target(
        f"{case}, forward + backward: AVX2 path against AVX-512",
        must,
        aim,
        lambda run: run.ratio((case, "cpp", "both"), (case, "cpp, v3", "both")),
    )


TARGETS = (
    _against("main, forward against peer", "main", "peer", "forward", 18, 32),
    _against("main, forward against eager", "main", "eager", "forward", 13, 23),
    _against("main, forward against compile", "main", "compile", "forward", 7, 12),
    _against("main, forward + backward against peer", "main", "peer", "both", 25, 41),
    _against("main, forward + backward against eager", "main", "eager", "both", 11, 17),
    _against("main, forward + backward against compile", "main", "compile", "both", 6.5, 10),
    _share("main, forward: share of FMA peak", "main", "forward", 0.60, 0.75),
    _share("main, forward + backward: share of FMA peak", "main", "both", 0.55, 0.75),
    _memory("main, forward: times less memory than einsum", "forward", 20, 40),
    _memory("main, forward + backward: times less memory than einsum", "both", 10, 15),
    Target(
        "main, forward + backward: all threads against one",
        1.8,
        1.95,
        lambda run: run.ratio(("main", "cpp, 1 thread", "both"), ("main", "cpp", "both")),
    ),
    _against("one-sample, forward against eager", "one-sample", "eager", "forward", 7, 20),
    _against("one-sample, forward against compile", "one-sample", "compile", "forward", 2.8, 7),
    _against("large, forward + backward against compile", "large", "compile", "both", 5, 8),
    _against("convolutional, forward + backward against compile", "convolutional", "compile", "both", 3.3, 6),
    _against("59-classes, forward + backward against compile", "59-classes", "compile", "both", 4, 8),
    _share("180x100, forward: share of FMA peak", "180x100", "forward", 0.50, 0.65),
    _share("180x100, forward + backward: share of FMA peak", "180x100", "both", 0.50, 0.65),
    _relative_share("E12-D6", 0.5, 0.8),
    _relative_share("E21-D9", 0.5, 0.8),
    *map(_option, ("leaky", "bias", "last", "shared")),
    Target(
        "bfloat16, forward + backward: time against float32",
        1.0,
        0.7,
        lambda run: run.ratio(("bfloat16", "ours", "both"), ("bfloat16", "beside", "both")),
        at_most=True,
    ),
    Target(
        "float64, forward + backward: throughput against float32",
        0.4,
        0.5,
        lambda run: run.ratio(("float64", "beside", "both"), ("float64", "ours", "both")),
    ),
    _avx2("main", 0.7, 0.8),
    _avx2("convolutional", 0.55, 0.8),
    _against("predict-votes, forward against einsum", "predict-votes", "einsum", "forward", 1, 1.3),
    _against("predict-votes, forward + backward against einsum", "predict-votes", "einsum", "both", 1, 1.3),
    _against("dynamic-routing, forward + backward against eager", "dynamic-routing", "eager", "both", 5, 8),
    _against("squash, forward against eager", "squash", "eager", "forward", 3, 5),
    _against("squash, forward + backward against eager", "squash", "eager", "both", 3, 5),
)

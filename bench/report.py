"""What was measured, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case, named
from bench.ceilings import Ceilings
from bench.measure import Outcome
from bench.targets import OURS, TARGETS, Record

_HEADER = (
    f"{'':22}{'forward ms':>20}{'backward ms':>20}{'fwd + bwd ms':>20}{'x ours':>14}"
    f"{'GFLOP/s':>13}{'% FMA':>11}{'GB/s':>7}{'% copy':>7}{'error':>9}"
)
LEGEND = """\
times     median (20 % to 80 %) of interleaved rounds in this process; forward under no_grad, fwd + bwd without
x ours    this time / that of this project's best backend: forward, fwd + bwd. Below 1 (marked !) we lose
GFLOP/s   forward, fwd + bwd, of the method that makes û again in every pass; % FMA of the peak above
GB/s      fwd + bwd, if every tensor but û went through memory once; % copy of the copy bandwidth above
error     the largest of output and gradients against float64, relative to the largest element"""


def table(case: Case, outcomes: Sequence[Outcome], ceilings: Ceilings) -> str:
    """A case's results for people."""
    ours = best(outcomes)
    lines = [str(case), _HEADER]
    lines += [_line(named(outcome.case) if outcome.case else case, outcome, ours, ceilings) for outcome in outcomes]
    notes = [f"  {each.name}: {each.regime}" for each in outcomes if each.regime not in ("", "plain")]
    notes += [f"  {each.name}: W as {each.layout}" for each in outcomes if each.layout not in ("", "ijde")]
    return "\n".join([*lines, *notes])


def best(outcomes: Iterable[Outcome]) -> Outcome | None:
    """That of this project's best backend that has a time."""
    found = {outcome.name: outcome for outcome in outcomes if outcome.times}
    return next((found[name] for name in OURS if name in found), None)


def _line(case: Case, outcome: Outcome, ours: Outcome | None, ceilings: Ceilings) -> str:
    text = f"{outcome.name:<22}"
    if not outcome.times:
        return text + "  " + "; ".join(dict.fromkeys(outcome.failed.values()))
    for quantity in ("forward", "backward", "both"):
        times = outcome.times.get(quantity)
        spread = "" if times is None else f"{_ms(times.median)} ({_ms(times.quantile(0.2))}-{_ms(times.quantile(0.8))})"
        text += f"{spread or '-':>20}"
    ratios, rates, shares = [], [], []
    for quantity in ("forward", "both"):
        seconds = outcome.seconds(quantity)
        base = ours.seconds(quantity) if ours is not None else None
        ratios.append("-" if seconds is None or not base else _ratio(seconds / base))
        rate = None if seconds is None else case.flop()[quantity] / seconds / 1e9
        rates.append("-" if rate is None else f"{rate:.0f}")
        shares.append("-" if rate is None else f"{100 * rate / ceilings.fma:.0f}")
    text += f"{' / '.join(ratios):>14}{' / '.join(rates):>13}{' / '.join(shares):>11}"
    both = outcome.seconds("both")
    moved = None if both is None else case.least_bytes()["both"] / both / 1e9
    text += f"{'-':>7}{'-':>7}" if moved is None else f"{moved:>7.1f}{100 * moved / ceilings.copy:>7.0f}"
    text += f"{max(outcome.errors.values(), default=0.0):>9.0e}"
    return text + ("  " + "; ".join(f"{q}: {why}" for q, why in outcome.failed.items()) if outcome.failed else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2g}!" if value < 0.995 else f"{value:.3g}"


def losses(record: Record) -> list[str]:
    """Every time a baseline is faster than this project."""
    found = []
    for case, outcomes in record.outcomes.items():
        ours = best(outcomes)
        for outcome in outcomes if ours is not None else ():
            for quantity in ("forward", "backward", "both"):
                theirs, mine = outcome.seconds(quantity), ours.seconds(quantity) if ours is not None else None
                if not outcome.ours and theirs is not None and mine is not None and theirs < mine:
                    what = f"{outcome.name} {_ms(theirs)} ms, ours {_ms(mine)} ms"
                    found.append(f"{case}, {quantity}: {what}: {mine / theirs:.2f}x slower")
    return found


def target_rows(record: Record) -> list[dict[str, Any]]:
    """Every target with its number; `measured` and `met` are None where the run has no number for it."""
    rows = []
    for target in TARGETS:
        value = target.measured(record)
        met = None if value is None else target.met(value)
        rows.append({"what": target.what, "must": target.must, "aim": target.aim, "measured": value, "met": met})
    return rows


def target_table(record: Record, *, missing: bool) -> str:
    """The targets as Markdown, those not measured only with `missing`."""
    lines = ["| target | must | aim | measured | |", "|---|---|---|---|---|"]
    for target, row in zip(TARGETS, target_rows(record), strict=True):
        if row["met"] is None and not missing:
            continue
        sign = "≤ " if target.at_most else ""
        value = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        verdict = {True: "met", False: "**not met**", None: "not measured"}[row["met"]]
        lines.append(f"| {target.what} | {sign}{target.must:g} | {sign}{target.aim:g} | {value} | {verdict} |")
    return "\n".join(lines)


def memory_table(record: Record) -> str:
    """Peak memory of one call, by case, as Markdown."""
    lines = ["| case | contender | forward | forward + backward |", "|---|---|---|---|"]
    for case, contenders in record.peaks.items():
        for name, peaks in contenders.items():
            cells = [_size(peaks.get(quantity, "-")) for quantity in ("forward", "both")]
            lines.append(f"| {named(case)} | {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _size(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value / 2**20:.1f} MiB"


def heap_table(warm: Record, default: Record) -> str:
    """How much slower everyone is on glibc's default heap, as Markdown."""
    lines = [
        "| case | contender | forward, warm / default heap, ms | forward + backward |",
        "|---|---|---|---|",
    ]
    for case, outcomes in default.outcomes.items():
        for outcome in outcomes:
            cells = []
            for quantity in ("forward", "both"):
                pair = warm.seconds(case, outcome.name, quantity), outcome.seconds(quantity)
                cells.append(" / ".join("-" if seconds is None else _ms(seconds) for seconds in pair))
            if outcome.times:
                lines.append(f"| {case} | {outcome.name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def as_dict(record: Record) -> dict[str, Any]:
    """A record for JSON."""
    return {
        "ceilings": vars(record.ceilings),
        "cases": {
            name: {
                "sizes": named(name).sizes,
                "flop": named(name).flop(),
                "contenders": [o.as_dict() for o in outcomes],
            }
            for name, outcomes in record.outcomes.items()
        },
        "peak_bytes": record.peaks,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a run's results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)

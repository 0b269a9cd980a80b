"""Counts, targets and tables, on numbers made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import plots, report
from bench.cases import CASES, MAIN, named, on_axis, select
from bench.ceilings import Ceilings
from bench.measure import Outcome, Times
from bench.targets import TARGETS, Record

CEILINGS = Ceilings(fma=200, fma_one_thread=100, fma_method="", sgemm=150, copy=30)


def _outcome(name: str, forward: float, both: float) -> Outcome:
    times = {"forward": Times([forward]), "backward": Times([both - forward]), "both": Times([both])}
    return Outcome(name, name.startswith(("cpp", "reference")), times=times)


def _record() -> Record:
    """A run in which the baselines need 8 and ours 1 ms, and main is as on the page of targets."""
    names = {"cpp": 1e-3, "cpp, 1 thread": 1.9e-3, "cpp, v3": 1.25e-3, "reference": 9e-3, "peer": 30e-3}
    names |= {"einsum": 20e-3, "elementwise": 16e-3, "compile einsum": 8e-3, "compile elementwise": 9e-3}
    outcomes = {case.name: [_outcome(name, t, 2 * t) for name, t in names.items()] for case in CASES}
    for case in CASES:
        if case.beside:
            outcomes[case.name].append(replace(_outcome("cpp of main", 2e-3, 4e-3), case="main"))
    peaks = {"main": {"cpp": {"forward": 5, "both": 50}, "einsum": {"forward": 125, "both": 450}}}
    return Record(outcomes, peaks, CEILINGS)


def test_counts_of_the_main_case() -> None:
    flop, least = MAIN.flop(), MAIN.least_bytes()
    assert flop["forward"] == pytest.approx(1321e6, rel=1e-3)
    assert flop["backward"] == pytest.approx(2029e6, rel=1e-3)
    assert least["forward"] == 4 * (128 * 1152 * 8 + 1152 * 10 * 8 * 16 + 128 * 10 * 16)


def test_every_target_has_a_number_and_none_without_a_run() -> None:
    record = _record()
    assert all(target.measured(record) is not None for target in TARGETS)
    assert all(target.measured(Record({}, {}, CEILINGS)) is None for target in TARGETS)


@pytest.mark.parametrize(
    ("what", "value", "met"),
    [
        ("main, forward against eager", 16, True),
        ("main, forward against compile", 8, True),
        ("main, forward + backward against peer", 30, True),
        ("main, forward + backward: all threads against one", 1.9, True),
        ("main, forward: times less memory than einsum", 25, True),
        ("main, forward + backward: times less memory than einsum", 9, False),
        ("main, forward + backward: AVX2 path against AVX-512", 0.8, True),
        ("main, forward: share of FMA peak", 1321.2e6 / 1e-3 / 200e9, True),
        ("leaky, forward + backward: time against plain", 0.5, True),
        ("float64, forward + backward: throughput against float32", 2, True),
        ("large, forward + backward against compile", 8, True),
    ],
)
def test_target(what: str, value: float, met: bool) -> None:
    row = next(row for row in report.target_rows(_record()) if row["what"] == what)
    assert row["measured"] == pytest.approx(value, rel=1e-3)
    assert row["met"] is met


def test_at_most_targets_are_missed_by_more() -> None:
    record = _record()
    beside = replace(_outcome("cpp of main", 1e-3, 2e-3), case="main")
    outcomes = {**record.outcomes, "leaky": [_outcome("cpp", 1.2e-3, 2.4e-3), beside]}
    table = report.target_table(Record(outcomes, {}, CEILINGS), missing=False)
    assert "| leaky, forward + backward: time against plain | ≤ 1.15 | ≤ 1 | 1.2 | **not met** |" in table
    assert "memory" not in table


def test_losses_are_printed() -> None:
    outcomes = [_outcome("cpp", 2e-3, 3e-3), _outcome("einsum", 1e-3, 4e-3)]
    record = Record({"main": outcomes}, {}, CEILINGS)
    assert report.losses(record) == ["main, forward: einsum 1 ms, ours 2 ms: 2.00x slower"]
    lines = report.table(MAIN, outcomes, CEILINGS).splitlines()
    assert "0.5! / 1.33" in next(line for line in lines if line.startswith("einsum"))


def test_a_table_says_why_there_is_no_time() -> None:
    outcomes = [
        _outcome("cpp", 1e-3, 2e-3),
        Outcome("peer", False, failed={"forward": "over 8 GiB", "both": "over 8 GiB"}),
    ]
    assert "peer                    over 8 GiB" in report.table(MAIN, outcomes, CEILINGS).splitlines()


def test_json_and_picture(tmp_path: Path) -> None:
    record = _record()
    report.write_json(tmp_path / "new" / "r.json", report.as_dict(record))
    content = json.loads((tmp_path / "new" / "r.json").read_text(encoding="utf-8"))
    first = content["cases"]["main"]["contenders"][0]
    assert (first["name"], first["times"]["both"]["median"]) == ("cpp", 2e-3)
    assert [size for size, _ in plots.points(record, "B", "peer")] == [4, 15, 16, 17, 32, 64, 128, 256]
    assert [milliseconds for _, milliseconds in plots.points(record, "J", "eager")] == [32.0] * 6
    plots.save(record, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert [case.in_capsules for case in on_axis("I")] == [36, 288, 1152, 4608, 9216]


def test_selecting() -> None:
    assert [case.name for case in select("LEAKY")] == ["leaky"]
    assert {case.name for case in select(quick=True)} == {
        "main",
        "one-sample",
        "predict-votes",
        "dynamic-routing",
        "squash",
    }
    with pytest.raises(ValueError, match="case must be one of main, "):
        named("mian")

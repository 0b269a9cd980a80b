"""bench/cases.py: what is measured, and in which order."""

from __future__ import annotations

from bench.cases import SWEEPS


def test_sweeps_take_turns() -> None:
    first = [case.name for case in SWEEPS[:6]]
    assert first == ["sweep-B4", "sweep-I36", "sweep-J1", "sweep-R1", "sweep-E4", "sweep-B15"]
    assert len({case.name for case in SWEEPS}) == len(SWEEPS) == 23

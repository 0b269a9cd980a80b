"""bench/ceilings.py: what is said of a machine."""

from __future__ import annotations

from dataclasses import replace

from bench import ceilings


def test_a_machine_that_takes_idle_memory_away_is_warned_of() -> None:
    calm = ceilings.Ceilings(100, 50, "", 80, 20, 1.4)
    assert calm.warnings() == []
    [warning] = replace(calm, idle=12.3).warnings()
    assert "12 times as long" in warning
    assert "1.4 x" in calm.lines()[-1]


def test_ceilings_are_rates() -> None:
    found = ceilings.measure(1)
    assert min(found.fma, found.fma_one_thread, found.sgemm, found.copy, found.idle) > 0
    assert found.fma_method


def test_the_highest_of_two_measurements() -> None:
    first, second = ceilings.Ceilings(100, 50, "a", 80, 20, 1.4), ceilings.Ceilings(90, 60, "b", 70, 30, 1.1)
    assert first.highest(second) == ceilings.Ceilings(100, 60, "a", 80, 30, 1.4)

"""Who is wrong or too large gets no time, everybody else does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import contenders, measure, peers
from bench.cases import Case
from bench.contenders import Absent, Contender, Limits
from caps_kernels import backends

CASE = Case("tiny", batch=2, in_capsules=4, out_capsules=3, in_dim=2, out_dim=4)
LIMITS = Limits()


def _outcomes(case: Case = CASE, limits: Limits = LIMITS) -> dict[str, measure.Outcome]:
    return {outcome.name: outcome for outcome in measure.run_case(case, limits, 0.0)}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)


@pytest.mark.parametrize("op", ["dense_capsules", "predict_votes", "dynamic_routing", "squash"])
def test_everybody_is_right_and_timed(op: str) -> None:
    case = Case("tiny", op=op, batch=2, in_capsules=4, out_capsules=3, in_dim=2, out_dim=4)
    outcomes = _outcomes(case)
    assert {"reference", *peers.OF_OP[op]} <= set(outcomes)
    for outcome in outcomes.values():
        assert not outcome.failed
        assert set(outcome.times) == {"forward", "backward", "both"}
        assert all(len(times.samples) == measure.ROUNDS[0] for times in outcome.times.values())
        assert list(outcome.errors) == ["output", *(f"grad {name}" for name in case.shapes())]


def test_the_call_beside_is_held_to_its_own_case_and_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CASE, name="other", out_dim=5)
    monkeypatch.setattr(measure, "named", {"other": other}.__getitem__)
    outcomes = _outcomes(replace(CASE, leaky=True, peers=False, beside="other"))
    beside = [outcome for outcome in outcomes.values() if outcome.case]
    assert [outcome.case for outcome in beside] == ["other"]
    assert beside[0].name == f"{backends.available()[0]} of other"
    assert not beside[0].failed
    assert list(beside[0].errors) == ["output", "grad u", "grad weight"]
    assert set(beside[0].times) == {"forward", "backward", "both"}


@pytest.mark.parametrize("spoil", [lambda v: v * 1.001, lambda v: v * float("nan")])
def test_who_is_wrong_gets_no_time(spoil: object, monkeypatch: pytest.MonkeyPatch) -> None:
    build = contenders.build

    def with_a_wrong_one(
        case: Case, inputs: list[torch.Tensor], limits: Limits, **options: object
    ) -> tuple[list[Contender], list[Absent]]:
        present, absent = build(case, inputs, limits, **options)  # type: ignore[arg-type]
        right = next(each for each in present if each.name == "reference")
        wrong = Contender("wrong", inputs, lambda: spoil(right.function()), ours=True)  # type: ignore[operator]
        return [*present, wrong], absent

    monkeypatch.setattr(measure, "build", with_a_wrong_one)
    outcomes = _outcomes()
    assert outcomes["wrong"].failed["forward"].startswith("wrong: error ")
    assert not outcomes["wrong"].times
    assert outcomes["reference"].times


def test_who_raises_is_a_result() -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("no memory\nsecond line")

    inputs = CASE.inputs()
    wrong = Contender("broken", inputs, fail, ours=False)
    outcomes = {"broken": measure.Outcome("broken", False)}
    measure.check(CASE, [wrong], outcomes, CASE.grad_output())
    assert outcomes["broken"].failed == {"forward": "failed: no memory", "both": "failed: no memory"}


def test_over_a_limit_of_memory() -> None:
    votes = 4 * CASE.votes
    outcomes = _outcomes(limits=Limits(bytes=3.0 * votes))
    assert set(outcomes["einsum"].times) == {"forward"}
    assert outcomes["einsum"].failed["both"].startswith("over 0 GiB")
    assert list(outcomes["einsum"].errors) == ["output"]
    assert not outcomes["peer"].times
    assert outcomes["peer"].failed["forward"].startswith("over 0 GiB")


def test_over_a_limit_of_time() -> None:
    outcomes = _outcomes(limits=Limits(seconds=1e-9))
    assert not outcomes["einsum"].times
    assert outcomes["einsum"].failed["both"] == "over 0 s (0)"


def test_layouts_are_undone_for_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("idje", "ijed"):
        monkeypatch.setattr(contenders, "fastest_layout", lambda *_, layout=layout: layout)
        outcome = _outcomes()["einsum"]
        assert outcome.layout == layout
        assert not outcome.failed


def test_only_keeps_names() -> None:
    present, absent = contenders.build(CASE, CASE.inputs(), LIMITS, only=["elementwise"])
    assert [each.name for each in present] == ["elementwise"]
    assert not absent


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with contenders.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_quantiles() -> None:
    times = measure.Times([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert times.as_dict() == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}
    assert measure.Times([1.0, 2.0]).quantile(0.2) == pytest.approx(1.2)

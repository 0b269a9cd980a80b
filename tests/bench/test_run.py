"""The programs, on cases that cost nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import ceilings, compare, end_to_end, machine, memory, run
from bench.cases import MAIN, Case
from caps_kernels import backends

TINY = replace(MAIN, batch=2, in_capsules=4, compile=False, extras=(), memory=False)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ceilings.Ceilings(100, 50, "", 80, 20)
    monkeypatch.setattr(ceilings, "measure", lambda *_: known)
    monkeypatch.setattr(run, "TARGETS", (TINY,))
    monkeypatch.setattr(run, "named", lambda _: TINY)
    monkeypatch.setattr(compare, "named", lambda _: TINY)


def test_a_run_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "r.json", tmp_path / "p.png"
    flags = ["--heap", "default", "--only", "main", "--json", str(file), "--plot", str(picture)]
    assert run.main([*flags, "--no-memory"]) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    names = {each["name"] for each in content["cases"]["main"]["contenders"]}
    assert {"reference", "einsum", "elementwise", "peer"} <= names
    assert content["ceilings"]["fma"] == 100
    assert picture.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "FMA peak            100 GFLOP/s" in printed
    assert "left alone for 0.1 s" not in printed
    assert "| main, forward against peer | 18 | 32 | " in printed


def test_shares_of_targets_refer_to_the_higher_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([ceilings.Ceilings(100, 90, "", 80, 20), ceilings.Ceilings(200, 100, "", 80, 20)])
    monkeypatch.setattr(ceilings, "measure", lambda *_: next(found))
    file = tmp_path / "r.json"
    assert run.main(["--heap", "default", "--only", "main", "--no-memory", "--json", str(file)]) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["ceilings"]["fma"] == 200
    assert content["ceilings_at_the_start"]["fma"] == 100
    assert "was 100 GFLOP/s at the start and 200 at the end" in capsys.readouterr().out


def test_a_run_that_is_ended_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured_again(*_: object) -> ceilings.Ceilings:
        raise KeyboardInterrupt

    first = iter([ceilings.Ceilings(100, 50, "", 80, 20)])
    monkeypatch.setattr(ceilings, "measure", lambda *_: next(first, None) or measured_again())
    file = tmp_path / "r.json"
    assert run.main(["--heap", "default", "--only", "main", "--no-memory", "--json", str(file)]) == 130
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["cases"]["main"]["contenders"]
    assert content["machine"]["torch"]
    assert content["ceilings_at_the_end"] == {}


def test_no_case_is_begun_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    given = run.build_parser().parse_args(["--minutes", "0", "--heap", "default", "--no-memory"])
    run.run(given, [TINY], "cpu")
    assert "not run: the time is over (--minutes)" in capsys.readouterr().out


def test_no_case_is_begun_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda *_: 2.0**30)
    given = run.build_parser().parse_args(["--heap", "default", "--no-memory"])
    run.run(given, [TINY], "cpu")
    assert "not run: needs about 2 GiB, 1 are free" in capsys.readouterr().out


def test_list_and_a_filter_that_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--filter", "sweep-r5"]) == 0
    assert capsys.readouterr().out == "sweep-R5         B128 I1152 J10 D8 E16 R5\n"
    with pytest.raises(SystemExit, match="2"):
        run.main(["--filter", "nothing"])
    assert "no case contains 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run.main(["--threads", "0"])


def test_heap_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in machine.WARM_HEAP.items():
        monkeypatch.setenv(name, value)
    assert machine.heap() == "warm"
    assert not set(machine.WARM_HEAP) & set(machine.environment(warm=False))
    monkeypatch.delenv("MALLOC_TOP_PAD_")
    assert machine.heap() == "default"
    assert machine.environment(warm=True)["MALLOC_TOP_PAD_"] == machine.WARM_HEAP["MALLOC_TOP_PAD_"]


def test_the_child_of_a_comparison_answers_line_by_line() -> None:
    answers = io.StringIO()
    compare.serve(io.StringIO("main\nmain round\n"), answers, "cpu")
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first["contenders"]
    assert set(second) == {f"{name} {what}" for name in first["contenders"] for what in ("forward", "both")}
    assert all(seconds > 0 for seconds in second.values())


def test_a_comparison_with_no_such_commit(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.against("no-such-revision", [TINY], "cpu", 60) == 1
    assert "git worktree add" in capsys.readouterr().err


def test_peak_memory_counts_the_result_and_not_the_input() -> None:
    if not machine.reset_peak():
        pytest.skip("this system keeps no record of peak memory that can be reset")
    size = 4 * 128 * 1152 * 10 * 16
    found = memory.in_fresh_process(Case("squash", op="squash"), "elementwise", "forward", 1)
    assert isinstance(found, int), found
    assert 0.99 * size < found < 3 * size


def test_peak_memory_of_three_processes_is_their_median(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int | str] = [118, 148, 142, 118, "over 300 s", 142]
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: answers.pop(0))
    assert memory.median_of_processes(TINY, "einsum", "forward", 1, 3) == 142
    assert memory.median_of_processes(TINY, "einsum", "forward", 1, 3) == "over 300 s"


def test_a_step_is_taken_apart() -> None:
    (row,) = [
        row for row in end_to_end.measure("logo_capsnet", "cpu", 1, ["plain"], batch=2) if row["backend"] == "reference"
    ]
    assert 0 < row["capsule_ms"] < row["step_ms"]
    assert row["images_per_second"] == pytest.approx(2000 / row["step_ms"])
    assert not row["default"]
    faster = {**row, "backend": "cpp", "default": True, "images_per_second": 3 * row["images_per_second"]}
    table = end_to_end.table([row, faster])
    assert "| 3.00x |" in table
    assert "| reference | plain |" in table
    assert "| cpp | plain * |" in table


def test_the_step_of_train_py_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "suits_bfloat16", lambda device: True)
    best = backends.available()[0]
    steps = [end_to_end.Step("logo_capsnet", best, variant, 2, "cpu") for variant in end_to_end.VARIANTS]
    assert [step.variant for step in steps if step.is_default()] == ["channels_last, bfloat16"]

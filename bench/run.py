"""Measure the kernels: `python bench/run.py` is enough, `--help` teaches the rest."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from tqdm import tqdm

from bench import ceilings, compare, machine, measure, memory, plots, report
from bench.cases import CASES, TARGETS, Case, named, select
from bench.clock import Clock
from bench.contenders import Limits
from bench.targets import Record
from caps_kernels import backends

DESCRIPTION = """\
Speed, memory and accuracy of this project's backends against plain PyTorch (bench/peers.py), in one
run. Each case first holds everyone against float64: who is wrong gets no time. Then forward,
backward and both in interleaved rounds. The machine's ceilings are measured in the same run."""

EPILOG = """\
examples:
  python bench/run.py                           everything, at most 40 minutes
  python bench/run.py --quick                   the main shapes, at most 4 minutes
  python bench/run.py --filter sweep-I          one sweep; --list shows all names
  python bench/run.py --json r.json --plot r.png
  python bench/run.py --base HEAD~1 --filter main
                                                this tree against a commit, in turns

On a CPU under Linux the program starts itself anew with a warm heap: with glibc's default one, eager
PyTorch spends most of its time in page faults, and everything else looks faster than it is. Two cases
are shown with both heaps. A contender that would go over --limit-seconds or --limit-gib is not run,
and that is its result. Close other programs first: shares of a ceiling mean little on a busy machine."""

_HEAP_CASES = ("main", "59-classes")
_SECONDS_A_CASE = {True: 5.0, False: 12.0}
_RESERVE = 45.0
# The largest case takes 13 GiB of a machine's 24, results and their check in float64 included.
_HEAP_LIMIT = 2**30


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few cases, few rounds: at most 4 minutes on two slow cores")
    add("--filter", default="", metavar="TEXT", help="only cases whose name or sizes contain TEXT (see --list)")
    add("--list", action="store_true", help="print the cases and stop")
    add("--json", type=Path, metavar="FILE", help="write every number to FILE")
    add("--plot", type=Path, metavar="FILE.png", help="draw time against B, I, J, R and memory against I")
    add("--base", metavar="REV", help="compare this tree's backends with those of a commit instead of the baselines")
    add("--threads", type=_positive, metavar="N", help=f"of torch (here {torch.get_num_threads()} by default)")
    add("--minutes", type=float, metavar="M", help="begin no further case after M minutes (default 40; 4 with --quick)")
    add("--limit-seconds", type=float, default=30, metavar="S", help="of one call (default 30)")
    add(
        "--limit-gib",
        type=float,
        default=12,
        metavar="G",
        help="of one call's memory (default 12, at most 70 %% of what is free)",
    )
    add("--no-memory", action="store_true", help="leave out the measurements of memory, which start many processes")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes about 15 s a case")
    add("--heap", choices=("warm", "default"), default="warm", help="warm (default): see below")
    add("--only", default="", metavar="NAMES", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def chosen(given: argparse.Namespace) -> list[Case]:
    """The cases the flags ask for, in order."""
    if given.only:
        return [named(name) for name in given.only.split(",")]
    return select(given.filter, quick=given.quick)


class Run:
    """A run in progress."""

    def __init__(self, given: argparse.Namespace, cases: Sequence[Case], device: str, about: dict[str, str]) -> None:
        minutes = given.minutes if given.minutes is not None else (4 if given.quick else 40)
        self.given, self.cases, self.device, self.about = given, cases, device, about
        self.deadline = time.monotonic() + 60 * minutes
        self.limits = Limits.here(given.limit_seconds, given.limit_gib, device)
        self.record = Record({}, {}, ceilings.measure(torch.get_num_threads(), device))
        self.outcomes: dict[str, list[measure.Outcome]] = {}
        self.peaks: dict[str, dict[str, dict[str, int | str]]] = {}
        self.record.outcomes, self.record.peaks = self.outcomes, self.peaks
        self.not_run: dict[str, str] = {}
        self.before: ceilings.Ceilings = self.record.ceilings
        self.after: ceilings.Ceilings | None = None
        self.default: Record | None = None

    def save(self) -> None:
        """Write what is known so far, where --json asks for it: a run that is ended from outside loses nothing."""
        if self.given.json is None:
            return
        content = {"machine": self.about, "measures": Clock(self.device).what, **report.as_dict(self.record)}
        content |= {"ceilings_at_the_start": vars(self.before)}
        content |= {"ceilings_at_the_end": vars(self.after) if self.after is not None else {}}
        content |= {"not_run": self.not_run}
        targets = report.target_rows(self.record) if self.device == "cpu" else []
        content |= {"targets": targets, "losses": report.losses(self.record)}
        content |= {"default_heap": report.as_dict(self.default)["cases"] if self.default is not None else {}}
        report.write_json(self.given.json, content)

    def time_left(self) -> float:
        """Seconds until no further case is begun."""
        return self.deadline - time.monotonic()

    def time(self, cases: Sequence[Case], reserve: float) -> None:
        """Check and time cases one after the other, and print each as soon as it is done.

        Args:
            cases: in order.
            reserve: seconds to leave for what comes after.
        """
        with tqdm(cases, unit="case", disable=None) as bar:
            for case in bar:
                bar.set_postfix_str(case.name)
                reason = self._why_not(case, reserve)
                if reason is not None:
                    self.not_run[case.name] = reason
                    tqdm.write(f"{case}\n  not run: {reason}\n")
                    continue
                outcomes = measure.run_case(
                    case,
                    self.limits,
                    _SECONDS_A_CASE[self.given.quick],
                    device=self.device,
                    compiled=not self.given.no_compile,
                )
                self.outcomes[case.name] = outcomes
                tqdm.write(report.table(case, outcomes, self.record.ceilings) + "\n")
                self.save()
                if machine.resident() > _HEAP_LIMIT:
                    machine.give_memory_back()

    def _why_not(self, case: Case, reserve: float) -> str | None:
        if self.time_left() < reserve:
            return "the time is over (--minutes)"
        size = case.torch_dtype.itemsize * sum(math.prod(shape) for shape in case.shapes().values())
        free = machine.available_memory(self.device)
        # Inputs, gradients, another layout of W where there are baselines, and room for float64.
        needed = (3 if case.peers and size < 2**30 else 2) * size + 2**31
        if needed > 0.9 * free:
            return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return None

    def measure_memory(self, cases: Sequence[Case], reserve: float) -> None:
        """Peak memory of who took part in the cases that ask for it, each in a process of its own."""
        jobs = [
            (case, outcome.name, quantity)
            for case in cases
            if case.memory and case.name in self.outcomes
            for outcome in self.outcomes[case.name]
            if self._weighs(case, outcome)
            for quantity in ("forward", "both")
        ]
        for case, name, quantity in tqdm(jobs, desc="memory", unit="process", disable=None):
            if self.time_left() < reserve:
                break
            judged = case.name == "main" and name in (backends.available()[0], "einsum") and not self.given.quick
            found = memory.median_of_processes(case, name, quantity, torch.get_num_threads(), 3 if judged else 1)
            self.peaks.setdefault(case.name, {}).setdefault(name, {})[quantity] = found

    def _weighs(self, case: Case, outcome: measure.Outcome) -> bool:
        if self.given.quick and outcome.name not in (backends.available()[0], "einsum"):
            return False
        return "," not in outcome.name and (case.name == "main" or outcome.name not in ("elementwise", "reference"))

    def measure_default_heap(self) -> Record | None:
        """Some cases again in a process with glibc's default heap."""
        names = [name for name in _HEAP_CASES if name in self.outcomes]
        if machine.heap() != "warm" or not names or self.time_left() < _RESERVE:
            return None
        with tempfile.TemporaryDirectory(prefix="caps_bench_") as folder:
            file = Path(folder, "default.json")
            command = [sys.executable, str(Path(__file__).resolve()), "--heap", "default", "--only", ",".join(names)]
            command += ["--json", str(file), "--no-memory", "--no-compile", "--threads", str(torch.get_num_threads())]
            command += ["--quick"] if self.given.quick else []
            environment = machine.environment(warm=False)
            try:
                subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True, timeout=self.time_left()
                )
            except subprocess.TimeoutExpired:
                tqdm.write("the default heap was not measured: the time is over (--minutes)\n")
                return None
            except subprocess.CalledProcessError as error:
                tqdm.write(f"the default heap could not be measured:\n{error.stderr}")
                return None
            cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
        outcomes = {name: [_outcome(each) for each in case["contenders"]] for name, case in cases.items()}
        return Record(outcomes, {}, self.record.ceilings)


def _outcome(saved: dict[str, Any]) -> measure.Outcome:
    times = {name: measure.Times([value["median"]]) for name, value in saved["times"].items()}
    return measure.Outcome(saved["name"], saved["ours"], errors=saved["errors"], times=times, failed=saved["failed"])


def run(given: argparse.Namespace, cases: Sequence[Case], device: str) -> None:
    """Measure, print, and write what was asked for."""
    about = machine.describe(device)
    print("\n".join(f"{name:<13} {value}" for name, value in about.items()))
    print(f"{'measures':<13} {Clock(device).what}")
    current = Run(given, cases, device, about)
    print("\n".join(current.record.ceilings.lines()), f"\n\n{report.LEGEND}\n", flush=True)
    first = [case for case in cases if case in TARGETS]
    current.time(first, 0.0 if given.only else _RESERVE)
    weighs = not given.no_memory and (device == "cuda" or machine.reset_peak())
    if weighs:
        current.measure_memory(first, _RESERVE)
    current.default = None if given.only else current.measure_default_heap()
    sweeps = [case for case in cases if case not in TARGETS]
    current.time(sweeps, 2 * _RESERVE)
    if weighs:
        current.measure_memory(sweeps, _RESERVE / 3)
    before, after = current.before, ceilings.measure(torch.get_num_threads(), device)
    current.record.ceilings, current.after = before.highest(after), after
    finish(current, current.default, before, after)
    current.save()
    if given.json is not None:
        print(f"wrote {given.json}")
    if given.plot is not None:
        plots.save(current.record, given.plot)
        print(f"wrote {given.plot}")


def finish(current: Run, default: Record | None, before: ceilings.Ceilings, after: ceilings.Ceilings) -> None:
    """Print what is known only at the end."""
    record = current.record
    if record.peaks:
        print("Peak memory of one call above its inputs, fresh process:\n\n" + report.memory_table(record) + "\n")
    if default is not None:
        print("glibc's default heap against the warm one:\n\n" + report.heap_table(record, default) + "\n")
    if current.device == "cpu":
        print("Targets (the machine they are set for has 2 cores with AVX-512):\n")
        print(report.target_table(record, missing=current.cases == list(CASES)) + "\n")
    lost = report.losses(record)
    print(f"Slower than a baseline: {len(lost) or 'nowhere'}")
    print("".join(f"  {line}\n" for line in lost))
    if record.ceilings.fma > 1.1 * min(before.fma, after.fma):
        print(
            f"The FMA peak was {before.fma:.0f} GFLOP/s at the start and {after.fma:.0f} at the end: the machine was "
            "busy or changed its clock, so shares are uncertain by as much. Tables refer to the first, targets to the "
            "higher.\n"
        )
    print("".join(f"{line}\n" for line in record.ceilings.warnings()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = build_parser()
    given = parser.parse_args(argv)
    cases = chosen(given)
    if not cases:
        parser.error(f"no case contains {given.filter!r}; see --list")
    if given.list:
        print("\n".join(f"{case.name:<16} {case.sizes}" for case in cases))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and given.heap == "warm" and machine.heap() != "warm" and sys.platform == "linux":
        machine.restart_with_warm_heap(Path(__file__).resolve())
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        if given.base is not None:
            return compare.against(given.base, cases, device, 60 * (given.minutes or (4 if given.quick else 40)))
        run(given, cases, device)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Two states of this project against each other: child processes that take turns, round by round.

Each child imports `caps_kernels` from its own folder and everything else from this tree, reads "CASE" or "CASE round"
lines from its standard input and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":
    _ROOT = str(Path(__file__).resolve().parent.parent)
    # The package under test comes from the folder that is named, bench and its helpers from this tree.
    sys.path[0] = sys.argv[1]
    import caps_kernels

    sys.path[0] = _ROOT
    # Submodules of the package keep coming from the folder of their package.
    assert Path(caps_kernels.__file__).is_relative_to(Path(sys.argv[1]).resolve()), caps_kernels.__file__

import torch
from tqdm import tqdm

from bench import machine, measure
from bench.cases import Case, named
from bench.clock import Clock
from bench.contenders import Contender, Limits, build
from caps_kernels import backends

ROUNDS = 15


class Child:
    """A process that measures one state of the package."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), str(folder), str(threads)]
        self.process = subprocess.Popen(
            command, env=machine.environment(warm=True), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line, wait for the answer.

        Raises:
            RuntimeError: the child has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(line, file=self.process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError("a measuring process ended; its message stands above") from error
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(lines: TextIO, answers: TextIO, device: str) -> None:
    """Be the child: answer every line."""
    clock, present, repeats = Clock(device), list[Contender](), dict[str, int]()
    grad_output = torch.empty(0)
    for line in lines:
        name, _, command = line.strip().partition(" ")
        case = named(name)
        if command != "round":
            present, grad_output, repeats = _prepare(case, device, clock)
            print(json.dumps({"contenders": [contender.name for contender in present]}), file=answers, flush=True)
            continue
        found = {}
        for contender in present:
            for quantity in ("forward", "both"):
                times = measure.sample(contender, quantity, grad_output, clock, repeats[f"{contender.name} {quantity}"])
                found[f"{contender.name} {quantity}"] = times[quantity]
        print(json.dumps(found), file=answers, flush=True)


def _prepare(case: Case, device: str, clock: Clock) -> tuple[list[Contender], torch.Tensor, dict[str, int]]:
    inputs, grad_output = case.inputs(device), case.grad_output(device)
    names = [name for name in backends.available() if name != "reference"] or ["reference"]
    built, _ = build(case, inputs, Limits.here(device=device), only=names)
    outcomes = {contender.name: measure.Outcome(contender.name, True) for contender in built}
    measure.check(case, built, outcomes, grad_output)
    present, repeats = [], {}
    for contender in built:
        if outcomes[contender.name].failed:
            print(f"{case.name}, {contender.name}: {outcomes[contender.name].failed}", file=sys.stderr)
            continue
        present.append(contender)
        for quantity in ("forward", "both"):
            seconds = measure.sample(contender, quantity, grad_output, clock, 1)[quantity]
            repeats[f"{contender.name} {quantity}"] = max(1, round(measure.SAMPLE_SECONDS / max(seconds, 1e-7)))
    return present, grad_output, repeats


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A folder with a commit's files, its compiled backends built.

    Raises:
        RuntimeError: there is no such commit, or it does not build.
    """
    with tempfile.TemporaryDirectory(prefix="caps_bench_") as folder:
        path = Path(folder, "base")
        _run(["git", "worktree", "add", "--detach", str(path), revision], machine.ROOT)
        try:
            _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], path)
            yield path
        finally:
            _run(["git", "worktree", "remove", "--force", str(path)], machine.ROOT)


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


def against(revision: str, cases: Sequence[Case], device: str, seconds: float) -> int:
    """Print the times of a commit and of this tree for every case; returns the exit status.

    Args:
        revision: anything git understands.
        cases: in order.
        device: "cpu" or "cuda".
        seconds: after which no further case is begun.
    """
    ends = time.monotonic() + seconds
    try:
        with worktree(revision) as base:
            children = {
                "base": Child(base, torch.get_num_threads()),
                "this": Child(machine.ROOT, torch.get_num_threads()),
            }
            try:
                print(f"{'':<54}{revision[:20] + ' ms':>22}{'this tree ms':>14}{'faster':>9}")
                for case in tqdm(cases, unit="case", disable=None):
                    if time.monotonic() > ends:
                        tqdm.write(f"{case}: not run, the time is over (--minutes)")
                        continue
                    for line in _compare(case, children):
                        tqdm.write(line)
            finally:
                for child in children.values():
                    child.close()
    except RuntimeError as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 1
    return 0


def _compare(case: Case, children: dict[str, Child]) -> Iterator[str]:
    for child in children.values():
        child.ask(case.name)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in children}
    for turn in range(ROUNDS):
        # Who goes second finds the machine as the first has left it; so they swap.
        for name in list(children) if turn % 2 else reversed(list(children)):
            for what, seconds in children[name].ask(f"{case.name} round").items():
                samples[name].setdefault(what, []).append(seconds)
    for what in {**samples["base"], **samples["this"]}:
        medians = [
            statistics.median(samples[side][what]) if what in samples[side] else None for side in ("base", "this")
        ]
        before, now = medians
        cells = "".join(
            f"{'-' if value is None else format(value * 1e3, '.3g'):>{w}}"
            for value, w in zip(medians, (22, 14), strict=True)
        )
        ratio = f"{before / now:>8.2f}x" if before is not None and now else f"{'-':>9}"
        yield f"{case.name + ', ' + what:<54}{cells}{ratio}"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    serve(sys.stdin, sys.stdout, "cuda" if torch.cuda.is_available() else "cpu")

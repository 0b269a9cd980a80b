"""Mistakes put into the sources of csrc/cuda one at a time: each must be noticed by a check that the right ones pass.

The sanitizers' findings end the process that loads the library, so every mistake gets a process of its own, which runs
one test of test_ops.py; `.ci/cuda` runs all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda_host import host

RACE, BEYOND, WRONG = "data race", "heap-buffer-overflow", "assert"
HEADERS = host.ROOT / "csrc" / "include" / "caps"


@dataclass(frozen=True)
class Mutant:
    """A change of one place in the sources of an op, the case that must notice it, and what is then said."""

    op: str
    name: str
    before: str
    after: str
    case: str
    sanitizer: str
    finding: str

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


SQUASH, VOTES, ROUTING = "squash", "predict_votes", "dynamic_routing"
SYNC = "    __syncthreads();\n"
ONE_SUM = ("sums + sharer * size + column", "sums + column")
REST = "end - i < args.tile ? end - i"
BATCH = "B - first < kBatch ? B - first"
MUTANTS = (
    Mutant(SQUASH, "one row too many", "row < rows ? E", "row <= rows ? E", "row-9", "address", BEYOND),
    Mutant(SQUASH, "half the lanes in a sum", "group_sum(square, args.width)", "square", "row-16", "", WRONG),
    Mutant(SQUASH, "a column too many", "at_once < count", "at_once <= count", "middle", "address", BEYOND),
    Mutant(VOTES, "one sample too many", BATCH, f"{BATCH} + 1", "plain", "address", BEYOND),
    Mutant(VOTES, "a row left out", "row < end;", "row < end - 1;", "plain", "", WRONG),
    Mutant(
        VOTES,
        "a row between chunks",
        "begin = chunk * args.chunk",
        "begin = chunk + chunk * args.chunk",
        "rows-33",
        "",
        WRONG,
    ),
    Mutant(VOTES, "packs that do not divide E", "view.size[dim] % n != 0 ||", "", "ones", "", WRONG),
    Mutant(ROUTING, "no barrier before the softmax", f"{SYNC}    softmax", "    softmax", "plain", "thread", RACE),
    Mutant(ROUTING, "no barrier after the softmax", f"gb, count);\n{SYNC}", "gb, count);\n", "plain", "thread", RACE),
    Mutant(ROUTING, "no barrier after a clear", f"sums[k] = 0;\n{SYNC}", "sums[k] = 0;\n", "plain", "thread", RACE),
    Mutant(ROUTING, "no grid barrier", "else grid_barrier();", "", "children-65", "thread", RACE),
    Mutant(
        ROUTING,
        "no barrier of a sample",
        "args.chunks == 1) __syncthreads();",
        "args.chunks == 1) {}",
        "last",
        "thread",
        RACE,
    ),
    Mutant(ROUTING, "all threads add to one sum", *ONE_SUM, "plain", "thread", RACE),
    Mutant(ROUTING, "a sum in the order of threads", *ONE_SUM, "children-31", "", WRONG),
    Mutant(ROUTING, "one capsule too many", REST, f"{REST} + 1", "children-33", "address", BEYOND),
    Mutant(ROUTING, "the leak left out", "+ (args.leaky ? exp(-most) : T(0))", "", "leaky", "", WRONG),
)


def write_changed(mutant: Mutant, folder: Path) -> Path:
    """A copy of the op's source and of the headers that kernels share, with the change; the source."""
    (folder / "caps").mkdir()
    changed = []
    for path in (host.SOURCES / f"{mutant.op}.cu", *HEADERS.glob("gpu*.h")):
        text = path.read_text(encoding="utf-8")
        if mutant.before in text:
            changed.append(path)
        target = folder / path.name if path.suffix == ".cu" else folder / "caps" / path.name
        target.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    assert len(changed) == 1, f"the text is in {changed}"
    return folder / f"{mutant.op}.cu"


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mistake_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    if not host.can_compile():
        pytest.skip("no g++ to compile the kernels for the host")
    source = write_changed(mutant, tmp_path)
    host.build(source, mutant.sanitizer)
    arguments = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "tests/cuda_host/test_ops.py"]
    arguments += ["-k", f"float32-contiguous-{mutant.op}-{mutant.case}]"]
    done = host.run_sanitized(mutant.sanitizer, arguments, **{host.CHANGED + mutant.op.upper(): str(source)})
    said = done.stdout + done.stderr
    assert done.returncode not in (0, 5), said[-2000:]  # 5: there is no such test
    assert mutant.finding in said, said[-2000:]

"""Mistakes put into the sources of csrc/cuda one at a time: each must be noticed by a check that the right ones pass.

The sanitizers' findings end the process that loads the library, so every mistake gets a process of its own, which runs
one test, of one case in float32; `.ci/cuda` runs all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda_host import host

RACE, BEYOND = "data race", "heap-buffer-overflow"  # said by sanitizers
WRONG, ORDER = "relative error", "built-in method equal"  # by the assertions of tests: against float64, in other orders
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


SQUASH, VOTES, ROUTING, DENSE = "squash", "predict_votes", "dynamic_routing", "dense_capsules"
SYNC = "    __syncthreads();\n"
ONE_SUM = ("sums + sharer * size + column", "sums + column")
REST = "end - i < args.tile ? end - i"
BATCH = "B - first < kBatch ? B - first"
ONE_U = "shared[threadIdx.x] = grad_u[0];\n"
WAIT = "else async_wait<2>();"
FETCH = "    fetch(at_ + args.stages - 1);\n"
NEXT = f"{SYNC}    forget();\n{FETCH}"
CHUNK = "i0 + args.chunk < I ? i0 + args.chunk : I"
SUM_OVER_LANES = """      const int n = scatter_sum<Tile::kWidth, 16>(part, 0);
      // Lanes that differ in what is left of the bits of samples hold the same sum.
      if (block_.row0 % (Tile::kSampleLanes / Tile::kWidth) == 0) {
        sums[(block_.parent(k) * block_.layout.D + d) * Tile::kE + block_.number(n)] += part[0];
      }
"""
SUM_AS_LANES_COME = """      for (int n = 0; n < Tile::kWidth; ++n) {
        sums[(block_.parent(k) * block_.layout.D + d) * Tile::kE + block_.number(n)] += part[n];
      }
"""
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
    Mutant(VOTES, "a row of both left out", "first + k >= end", "first + k >= end - 1", "together-rows", "", WRONG),
    Mutant(VOTES, "no barrier between warps", f"{ONE_U}  {SYNC}", ONE_U, "together-rows", "thread", RACE),
    Mutant(VOTES, "one half for all steps", "shared == of_warps ?", "false ?", "together-rows", "thread", RACE),
    Mutant(VOTES, "packs that do not divide E", "view.size[dim] % n != 0 ||", "", "ones", "", WRONG),
    Mutant(
        ROUTING, "no barrier before the softmax", f"{SYNC}    softmax", "    softmax", "children-31", "thread", RACE
    ),
    Mutant(
        ROUTING, "no barrier after the softmax", f"gb, count);\n{SYNC}", "gb, count);\n", "children-31", "thread", RACE
    ),
    Mutant(
        ROUTING, "no barrier after a clear", f"sums[k] = 0;\n{SYNC}", "sums[k] = 0;\n", "children-31", "thread", RACE
    ),
    Mutant(ROUTING, "no grid barrier", "else grid_barrier();", "", "children-65", "thread", RACE),
    Mutant(
        ROUTING,
        "no barrier of a sample",
        "whole_samples()) __syncthreads();",
        "whole_samples()) {}",
        "shared-last",
        "thread",
        RACE,
    ),
    Mutant(ROUTING, "all threads add to one sum", *ONE_SUM, "children-31", "thread", RACE),
    Mutant(ROUTING, "a sum in the order of threads", *ONE_SUM, "children-31", "", ORDER),
    Mutant(ROUTING, "one capsule too many", REST, f"{REST} + 1", "children-33", "address", BEYOND),
    Mutant(
        ROUTING,
        "the leak left out",
        "group_sum(sum, 32) + (args.leaky ? exp(-most) : T(0))",
        "group_sum(sum, 32)",
        "shared-leaky",
        "",
        WRONG,
    ),
    Mutant(ROUTING, "registers: no grid barrier", "else grid_barrier();", "", "held-chunks", "thread", RACE),
    Mutant(
        ROUTING,
        "registers: one capsule too many",
        "start + team < count;",
        "start + team <= count;",
        "held-9",
        "address",
        BEYOND,
    ),
    Mutant(
        ROUTING,
        "registers: one pack too many",
        "lane % lanes + lanes - 1) / lanes",
        "lane % lanes + lanes) / lanes",
        "held-9",
        "address",
        BEYOND,
    ),
    Mutant(
        ROUTING,
        "registers: a pack in two places",
        "from + k * kStep",
        "from + (k + 1) * kStep",
        "held-11x16",
        "address",
        BEYOND,
    ),
    Mutant(
        ROUTING,
        "registers: the leak left out",
        "sum_over_parents(sum) + (args.leaky ? exp(-most) : T(0))",
        "sum_over_parents(sum)",
        "held-10x16",
        "",
        WRONG,
    ),
    Mutant(
        ROUTING,
        "registers: lanes of other parents left out",
        "mean = sum_over_parents(mean);",
        "",
        "held-11x16",
        "",
        WRONG,
    ),
    Mutant(
        ROUTING,
        "registers: every team writes the sum of all",
        "team == 0 && k < held",
        "k < held",
        "held-9",
        "thread",
        RACE,
    ),
    Mutant(
        DENSE,
        "no barrier before the softmax",
        f"V, block.scores(0));\n{SYNC}",
        "V, block.scores(0));\n",
        "plain",
        "thread",
        RACE,
    ),
    Mutant(
        DENSE, "no barrier after the softmax", f"put_coupling);\n{SYNC}", "put_coupling);\n", "plain", "thread", RACE
    ),
    Mutant(DENSE, "no barrier before a capsule is used", NEXT, f"    forget();\n{FETCH}", "plain", "thread", RACE),
    Mutant(
        DENSE, "a capsule fetched before the barrier", NEXT, f"{FETCH}{SYNC}    forget();\n", "I-1330", "thread", RACE
    ),
    Mutant(DENSE, "no barrier between items", f"at_ = -1;\n{SYNC}", "at_ = -1;\n", "B-33", "thread", RACE),
    Mutant(DENSE, "no grid barrier", "if (step > args.begin) grid_barrier();", "", "plain", "thread", RACE),
    Mutant(
        DENSE,
        "a logit that another lane overwrites",
        "T(-INFINITY);  // x[0]",
        "x[0];  // x[0]",
        "plain",
        "thread",
        RACE,
    ),
    Mutant(
        DENSE,
        "scores overwritten by the next iteration",
        "__syncwarp();  // the lane",
        "// the lane",
        "plain",
        "thread",
        RACE,
    ),
    Mutant(DENSE, "no barrier before grad_u", f"sums);\n{SYNC}", "sums);\n", "plain", "thread", RACE),
    Mutant(
        DENSE,
        "no barrier in the plain gradients",
        "grad_u(b, i);\n      __syncthreads();",
        "grad_u(b, i);",
        "E-33",
        "thread",
        RACE,
    ),
    Mutant(DENSE, "a copy not waited for", WAIT, "else async_wait<3>();", "B-9", "", WRONG),
    Mutant(DENSE, "one sample too many", "first + r < u.size[0]", "first + r <= u.size[0]", "plain", "address", BEYOND),
    Mutant(DENSE, "one lower capsule too many", CHUNK, f"{CHUNK} + 1", "plain", "address", BEYOND),
    Mutant(DENSE, "one parent too few", "parent(k) < layout.J;", "parent(k) < layout.J - 1;", "plain", "", WRONG),
    Mutant(DENSE, "numbers beyond E", "if (number(n) + v < E) at[v]", "at[v]", "plain", "", WRONG),
    Mutant(DENSE, "a sum in the order of threads", SUM_OVER_LANES, SUM_AS_LANES_COME, "B-9", "", ORDER),
    Mutant(
        DENSE,
        "a part of a shared matrix left out",
        "part < args_.parts;",
        "part < args_.parts - 1;",
        "shared",
        "",
        WRONG,
    ),
    Mutant(DENSE, "a row of grad_bias left out", "row < R * B;", "row < R * B - 1;", "bias", "", WRONG),
)


def write_changed(mutant: Mutant, folder: Path) -> Path:
    """A copy of the op's source and of the headers that kernels share, with the change; the source.

    Every dtype is compiled as float32, the only one that runs: that halves the time.
    """
    (folder / "caps").mkdir()
    changed = []
    for path in (host.SOURCES / f"{mutant.op}.cu", *HEADERS.glob("gpu*.h")):
        text = path.read_text(encoding="utf-8")
        if mutant.before in text:
            changed.append(path)
        target = folder / path.name if path.suffix == ".cu" else folder / "caps" / path.name
        text = re.sub(r"f\.template operator\(\)<(double|BFloat16|Float16)>", "f.template operator()<float>", text)
        target.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    assert len(changed) == 1, f"the text is in {changed}"
    return folder / f"{mutant.op}.cu"


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_place_of_a_mistake_is_still_there(mutant: Mutant, tmp_path: Path) -> None:
    write_changed(mutant, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mistake_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    if not host.can_compile():
        pytest.skip("no g++ to compile the kernels for the host")
    source = write_changed(mutant, tmp_path)
    host.build(source, mutant.sanitizer)
    tests = ["tests/cuda_host/test_ops.py", "tests/cuda_host/test_dense_capsules.py"]
    case = f"{mutant.op}-{mutant.case}"
    arguments = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests]
    arguments += ["-k", f"torch.float32-contiguous-{case}] or [{case}-torch.float32]"]
    done = host.run_sanitized(mutant.sanitizer, arguments, **{host.CHANGED + mutant.op.upper(): str(source)})
    said = done.stdout + done.stderr
    assert done.returncode not in (0, 5), said[-2000:]  # 5: there is no such test
    assert mutant.finding in said, said[-2000:]

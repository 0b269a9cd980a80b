"""dense_capsules in C++: its regimes and the sizes at which they switch, instruction sets, threads, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from caps_kernels import _extension, backends
from tests.caches import CACHES, caches_for
from tests.cases import Case, dense_capsules
from tests.test_op_contract import RTOL, assert_near, gradients

pytestmark = pytest.mark.skipif(
    _extension.MISSING["cpp"] is not None, reason=f"no C++ library: {_extension.MISSING['cpp']}"
)

CASES = (
    dense_capsules("1-sample", 1, 9, 3, 8, 16, bias=True),
    dense_capsules("8-samples", 8, 35, 4, 5, 16, bias=True),
    dense_capsules("9-samples", 9, 35, 4, 5, 16, bias=True),
    dense_capsules("15-samples-odd", 15, 9, 3, 5, 21, bias=True, leaky=True),
    dense_capsules("16-samples", 16, 8, 10, 8, 16, iterations=4),
    dense_capsules("17-samples-last", 17, 13, 2, 9, 5, bias=True, routing_grad="last"),
    dense_capsules("33-samples-shared", 33, 12, 4, 8, 16, positions=4, bias=True),
    dense_capsules("33-samples-one-type", 33, 40, 4, 3, 7, positions=40, leaky=True, iterations=2),
    dense_capsules("70-samples", 70, 21, 3, 6, 12, positions=7, bias=True),
    dense_capsules("150-samples", 150, 5, 2, 4, 17, bias=True),
    dense_capsules("3-samples-last", 3, 21, 3, 6, 12, bias=True, routing_grad="last"),
    dense_capsules("33-samples-spread", 33, 9, 10, 3, 16, bias=True, leaky=True, iterations=4),
    dense_capsules("16-samples-spread-last", 16, 9, 7, 5, 24, routing_grad="last"),
    dense_capsules("18-samples-spread-shared", 18, 12, 8, 7, 20, positions=4, bias=True),
)
ONE_CAPSULE = "tiles, one lower capsule at a time"


@pytest.fixture(params=list(CACHES))
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Caches that call for tiles, for tiles of one lower capsule, and for quads."""
    with caches_for(request.param):
        yield request.param


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_dtype_and_number_of_threads(case: Case, isa: str, way: str, threads: None) -> None:
    for dtype, rtol in RTOL.items():
        inputs = case.inputs(dtype)
        if way != "quads" or (case.shapes["u"][0] >= 4 and case.shapes["weight"][3] != 5):
            assert regime_of(case, inputs).startswith("quads") == (way == "quads")
        if isa == "v4" and "spread" in case.name:
            assert (ONE_CAPSULE in regime_of(case, inputs)) == (way == "spread")
        exact = [t.detach().double().requires_grad_() for t in inputs]
        wanted = case.call(exact, "reference")
        wanted_gradients = gradients(wanted, exact)
        found = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            v = case.call(inputs, "cpp")
            found.append([v.detach(), *gradients(v, inputs)])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        # Where routing itself is ill-conditioned, twice the error of the reference in the same dtype is allowed.
        eager = case.call(inputs, "reference")
        names = ("v", *(f"gradient of {name}" for name in case.shapes))
        for name, got, want, plain, factor in zip(
            names, found[0], (wanted, *wanted_gradients), (eager, *gradients(eager, inputs)), (2, 8, 8, 8), strict=False
        ):
            allowed = max(factor * rtol, 2 * relative_error(plain, want))
            assert_near(got, want, allowed, f"{name} in {dtype}")


def test_the_regime_is_told_and_depends_on_the_number_of_samples() -> None:
    names = _extension.isa_names()
    with _extension.force_isa("v3" if "v3" in names else names[-1]), caches_for("quads"):
        lanes = 8 if "v3" in names else 4
        rows, quads, tiles = "rows: few samples", "quads: û of a few samples at a time", "tiles: samples in SIMD lanes"
        for samples, positions, in_dim, forward, backward in (
            (1, 1, 3, rows, "coefficients kept"),
            (3, 1, 3, rows if lanes == 8 else quads, "coefficients kept"),
            (4, 1, 3, quads, rows if lanes == 8 else tiles),
            (lanes // 2 + 1, 1, 3, quads, "coefficients kept"),
            (4 * lanes, 1, 3, quads, tiles),
            (4 * lanes, 1, 12, quads, "coefficients kept"),
            (1, 2, 3, quads, "coefficients kept"),
        ):
            u, weight = torch.randn(samples, 6, in_dim), torch.randn(6 // positions, 4, in_dim, 16)
            verdict = next(
                v for v in backends.explain("dense_capsules", u, weight, positions=positions) if v.backend == "cpp"
            )
            assert verdict.regime is not None
            assert verdict.regime.startswith(forward)
            assert verdict.regime.partition("; backward: ")[2].startswith(backward)
        u, weight = torch.empty(1, 1, 3).expand(1, 200_000, 3), torch.empty(1, 4, 3, 16).expand(200_000, 4, 3, 16)
        too_large = next(v for v in backends.explain("dense_capsules", u, weight) if v.backend == "cpp")
        assert too_large.regime is not None
        assert too_large.regime.startswith("tiles")


def told(case: Case, inputs: list[Tensor]) -> str:
    """What `explain` says of a call on "cpp"."""
    named = dict(zip(case.shapes, inputs, strict=True))
    verdicts = {v.backend: v for v in backends.explain("dense_capsules", **named, **case.options)}
    return str(verdicts["cpp"].regime)


def regime_of(case: Case, inputs: list[Tensor]) -> str:
    """ "rows", "quads", "tiles" or ONE_CAPSULE, where backward is another "quads, tiles", and "again" behind it where
    the backward computes the coefficients again."""
    forward, _, backward = told(case, inputs).partition("; backward: ")
    other = backward.partition(":")[0]
    names = [forward.partition(":")[0], *([other] if other in ("rows", "tiles", ONE_CAPSULE) else [])]
    return ", ".join(names) + (" again" if "coefficients computed again" in backward else "")


def assert_right(case: Case, isas: Sequence[str], regime: str) -> None:
    """Hold float32 against float64 on some instruction sets, all of which run in the same regime."""
    inputs = [(0.3 * t.detach()).requires_grad_() for t in case.inputs(torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = case.call(exact, "reference")
    wanted_gradients = gradients(wanted, exact)
    for isa in isas:
        with _extension.force_isa(isa):
            assert regime_of(case, inputs) == regime
            v = case.call(inputs, "cpp")
            found = gradients(v, inputs)
        assert_near(v, wanted, 5e-6, f"v with {isa}")
        for name, got, want in zip(case.shapes, found, wanted_gradients, strict=True):
            assert_near(got, want, 1e-5, f"gradient of {name} with {isa}")


@pytest.mark.parametrize("out_dim", [1, 5, 16, 21])
def test_both_sides_of_the_number_of_samples_at_which_rows_end(out_dim: int, isa: str) -> None:
    def case(samples: int) -> Case:
        return dense_capsules("", samples, 19, 4, 3, out_dim, bias=True, leaky=True, iterations=4)

    with caches_for("tiles"):
        rows = [b for b in range(1, 40) if regime_of(case(b), case(b).inputs(torch.float32)) == "rows"]
        most = len(rows)
        assert rows == list(range(1, most + 1))
        assert most > 0 or out_dim == 1
        for samples, regime in ((most, "rows"), (most + 1, "tiles")):
            if samples > 0:
                assert_right(case(samples), [isa], regime)


@pytest.mark.parametrize("in_dim", [3, 11, 12])
@pytest.mark.parametrize("samples", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
def test_quads_with_whole_and_empty_lanes(samples: int, in_dim: int, isa: str) -> None:
    # Matrices shared by two positions: few samples go to quads, too. In backward, matrices of few rows do where tiles
    # would leave over a fifth of their lanes empty.
    lanes = {"v3": 8, "v4": 16}.get(isa, 4)
    again = in_dim < 12 and 4 * lanes * -(-samples // lanes) <= 5 * samples
    for case in (
        dense_capsules("", samples, 22, 4, in_dim, 16, positions=2),
        dense_capsules("", samples, 22, 3, in_dim, 6, positions=11, bias=True, leaky=True, iterations=4),
        dense_capsules("", samples, 22, 3, in_dim, 3, positions=22, routing_grad="last"),
        dense_capsules("", samples, 22, 1, in_dim, 9, positions=2),
    ):
        with caches_for("quads"):
            assert_right(case, [isa], "quads, tiles" if again else "quads")


def test_quads_keep_what_is_read_again() -> None:
    with caches_for("quads"):
        for iterations, regime in ((1, "tiles"), (2, "quads, tiles"), (3, "quads")):
            case = dense_capsules("", 17, 22, 3, 12, 6, positions=11, bias=True, leaky=True, iterations=iterations)
            assert_right(case, _extension.isa_names(), regime)
        # Rows would keep it too, and leave lanes empty.
        few = dense_capsules("", 4, 9, 3, 8, 16, iterations=1)
        for isa in set(_extension.isa_names()) - {"v2", "baseline"}:
            with _extension.force_isa(isa):
                inputs = few.inputs(torch.float32)
                assert told(few, inputs).startswith("quads")
                exact = [t.detach().double() for t in inputs]
                assert_near(few.call(inputs, "cpp"), few.call(exact, "reference"), 1e-5, "v")


# The numbers of E for which a third of a quad's lanes, or fewer, are empty, whatever the instruction set.
@pytest.mark.parametrize(("out_dim", "regime"), [(1, "tiles"), (3, "quads"), (5, "tiles"), (6, "quads"), (9, "quads")])
def test_quads_are_not_for_lanes_that_stay_empty(out_dim: int, regime: str) -> None:
    case = dense_capsules("", 20, 9, 3, 12, out_dim)
    with caches_for("quads"):
        assert_right(case, _extension.isa_names(), regime)


# û of 8 samples in quads takes 8 · 4 I J E bytes, of which the cache holds 3/8; with W 5/8.
VOTES, MATRICES = dense_capsules("", 16, 64, 4, 12, 16, positions=64), dense_capsules("", 16, 64, 4, 24, 16)
VOTES_FIT, MATRICES_FIT = 8 * -(-8 * 4 * 64 * 4 * 16 // 3), 8 * -(-4 * 64 * 4 * 16 * (8 + 24) // 5)
SHARED_CACHES = (
    ("votes-fit", VOTES, VOTES_FIT, "quads"),
    ("votes-do-not", VOTES, VOTES_FIT - 8, "tiles"),
    ("matrices-fit", MATRICES, MATRICES_FIT, "quads"),
    ("matrices-do-not", MATRICES, MATRICES_FIT - 8, "tiles"),
    ("two-groups-of-8", dense_capsules("", 16, 36, 4, 12, 16), 1 << 19, "quads"),
    ("groups-of-8-and-1", dense_capsules("", 25, 36, 4, 12, 16), 1 << 19, "quads"),
    ("one-group", dense_capsules("", 70, 36, 4, 12, 16), 32 << 20, "quads"),
    ("groups-of-24", dense_capsules("", 70, 36, 4, 12, 16), 3 << 20, "quads"),
    ("over-56-MiB", dense_capsules("", 36, 3500, 60, 12, 3, positions=3500), 32 << 20, "tiles again"),
    ("56-MiB", dense_capsules("", 256, 780, 15, 12, 3, positions=780), 32 << 20, "quads"),
    ("quads-over-56-MiB", dense_capsules("", 272, 780, 15, 12, 3, positions=780), 32 << 20, "quads again"),
    (
        "quads-over-56-MiB-last",
        dense_capsules("", 272, 780, 15, 12, 3, positions=780, routing_grad="last"),
        32 << 20,
        "quads again",
    ),
)


@pytest.mark.parametrize(("case", "cache", "regime"), [pytest.param(*rest, id=name) for name, *rest in SHARED_CACHES])
def test_both_sides_of_what_a_cache_holds(case: Case, cache: int, regime: str) -> None:
    with caches_for("quads", cache):
        assert_right(case, _extension.isa_names(), regime)


LIMITS = {
    "rows": (
        dense_capsules("1-sample", 1, 9, 3, 8, 16),
        dense_capsules("votes-of-32-MiB", 1, 8192, 2, 1, 512),
        dense_capsules("rows-of-56-MiB", 1, 7632, 64, 1, 16, iterations=8),
    ),
    "tiles": (
        *(dense_capsules(f"{b}-samples", b, 9, 3, 8, 16) for b in (15, 16, 17, 33)),
        dense_capsules("votes-over-32-MiB", 1, 8193, 2, 1, 512),
        dense_capsules("56-MiB-kept", 16, 3570, 64, 1, 2),
        dense_capsules("u-of-16-MiB", 16, 4096, 1, 64, 2, bias=True),
        dense_capsules("u-over-16-MiB", 17, 4097, 1, 64, 2, bias=True),
        dense_capsules("u-past-the-caches", 17, 4100, 2, 8, 3, bias=True),
        dense_capsules("u-past-the-caches-odd", 17, 4110, 2, 8, 3, positions=5),
        dense_capsules("u-over-16-MiB-shared", 16, 4200, 2, 64, 3, positions=420, routing_grad="last"),
        dense_capsules("matrices-of-a-chunk-over-512-KiB", 17, 520, 32, 16, 16),
        # Over 32 MiB of grad_W, from one tile or two, go past the caches.
        *(dense_capsules(f"matrices-past-the-caches-{b}-samples", b, 257, 64, 32, 16) for b in (9, 32)),
        dense_capsules("partial-sums-of-8-MiB", 700, 20, 64, 1, 16),
        # Lower capsules of eight tiles, of 4, 8 or 16 samples each, are taken together in the last pass of backward.
        *(dense_capsules(f"{b}-samples-in-tiles", b, 21, 3, 6, 12) for b in (32, 36, 64, 72, 128, 129)),
    ),
    "tiles again": (
        dense_capsules("rows-over-56-MiB", 1, 7644, 64, 1, 16, iterations=8),
        dense_capsules("over-56-MiB", 16, 3571, 64, 1, 2),
        dense_capsules("over-56-MiB-last", 16, 3571, 64, 1, 2, routing_grad="last"),
        dense_capsules("over-56-MiB-and-u-over-16-MiB", 16, 4097, 64, 64, 2),
    ),
}


@pytest.mark.parametrize(
    ("regime", "case"), [pytest.param(r, case, id=case.name) for r, group in LIMITS.items() for case in group]
)
def test_both_sides_of_limits(regime: str, case: Case) -> None:
    # Without quads, which would take most of these.
    with caches_for("tiles"):
        assert_right(case, _extension.isa_names(), regime)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", [{}, {"routing_grad": "last"}, {"positions": 100}], ids=str)
def test_beyond_the_budget_coefficients_are_computed_again(options: dict[str, object]) -> None:
    # 2 · 9 iterations of [33 samples in 5 tiles of 8 lanes, 600, 60] doubles are over 56 MiB, whatever the lanes.
    case = dense_capsules("large", 33, 600, 60, 2, 3, iterations=10, bias=True, **options)  # type: ignore[arg-type]
    inputs, exact = case.inputs(), case.inputs()
    got, wanted = case.call(inputs, "cpp"), case.call(exact, "reference")
    assert_near(got, wanted, 1e-12, "v")
    for g, w in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
        assert_near(g, w, 1e-10, "gradient")


PEAK = """
import sys
import torch
from caps_kernels.functional import dense_capsules

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

b, i, j, d, e, iterations = map(int, sys.argv[1:])
dense_capsules(torch.randn(2, 4, 3), torch.randn(4, 2, 3, 4, requires_grad=True), backend="cpp").sum().backward()
u = torch.randn(b, i, d, requires_grad=True)
weight = torch.randn(i, j, d, e, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
dense_capsules(u, weight, iterations=iterations, backend="cpp").sum().backward()
print(status("VmHWM") - before)
"""


def peak_memory(b: int, i: int, j: int, d: int, e: int, iterations: int) -> int:
    """Bytes of forward and backward above the inputs, gradients included, in a process of its own."""
    command = [sys.executable, "-c", PEAK, *map(str, (b, i, j, d, e, iterations))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_memory_where_the_votes_would_be_4_gib() -> None:
    assert 0 < peak_memory(512, 4096, 32, 8, 16, 3) < 0.1 * 2**32


def test_memory_on_both_sides_of_the_budget_for_coefficients() -> None:
    # 2 · B · I · J coefficients and B · I · D numbers of u, of 4 bytes, are just 56 MiB, while the votes would be over
    # 4 GiB; then a little more.
    kept = peak_memory(1024, 796, 8, 2, 168, 2)
    computed_again = peak_memory(1024, 800, 8, 2, 168, 2)
    assert computed_again + 32 * 2**20 < kept < 0.1 * 2**32


COMPUTED_AGAIN = dense_capsules("coefficients-over-56-MiB", 33, 600, 60, 2, 3, iterations=10)
# Four lower capsules of two tiles at once, the last three of a chunk by themselves; E ends in a part of a quad.
FOUR_OF_TWO = dense_capsules("four-capsules-of-two-tiles", 33, 11, 10, 3, 18, bias=True)
TAKES_SPREAD = [case for case in CASES if "spread" in case.name or case.name == "16-samples"]


@pytest.mark.parametrize(
    "case", [*(case for case in CASES if case not in TAKES_SPREAD), COMPUTED_AGAIN, FOUR_OF_TWO], ids=str
)
def test_two_tiles_at_once_change_no_bit(case: Case, isa: str) -> None:
    found = []
    for way in ("tiles", "spread"):
        with caches_for(way):
            inputs = case.inputs(torch.float32)
            assert ONE_CAPSULE not in regime_of(case, inputs)
            v = case.call(inputs, "cpp")
            found.append([v.detach(), *gradients(v, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Where one lower capsule is taken at a time: û of two of two tiles, with V and the sums of these, is over 48 KiB, that
# of one fits 7/8 of it with u spread, and in backward g too; E fills four quads, each whole.
ONE_OR_TWO = (
    ("two-fit", dense_capsules("", 16, 9, 4, 8, 16), "tiles"),
    ("two-fit-in-forward", dense_capsules("", 16, 9, 6, 8, 16, iterations=2), f"tiles, {ONE_CAPSULE}"),
    ("two-do-not", dense_capsules("", 40, 9, 7, 8, 16, bias=True), ONE_CAPSULE),
    ("backward-fits", dense_capsules("", 17, 9, 10, 8, 16, leaky=True), ONE_CAPSULE),
    ("backward-does-not", dense_capsules("", 17, 9, 10, 9, 16), f"{ONE_CAPSULE}, tiles"),
    ("forward-fits", dense_capsules("", 16, 9, 13, 8, 16), f"{ONE_CAPSULE}, tiles"),
    ("forward-does-not", dense_capsules("", 34, 11, 14, 8, 16), "tiles"),
    ("three-quads", dense_capsules("", 16, 9, 12, 8, 12), "tiles"),
    ("part-of-a-quad", dense_capsules("", 16, 9, 8, 8, 18), "tiles"),
    ("over-56-MiB", dense_capsules("", 33, 1950, 9, 1, 16, iterations=10), f"{ONE_CAPSULE} again"),
)


@pytest.mark.skipif("v4" not in _extension.isa_names(), reason="takes vectors of 64 bytes")
@pytest.mark.parametrize(("case", "regime"), [pytest.param(*rest, id=name) for name, *rest in ONE_OR_TWO])
def test_both_sides_of_one_lower_capsule_at_a_time(case: Case, regime: str) -> None:
    with caches_for("spread"):
        assert_right(case, ["v4"], regime)


@pytest.mark.skipif("v4" not in _extension.isa_names(), reason="takes vectors of 64 bytes")
def test_tiles_of_few_empty_lanes_go_before_quads_where_the_innermost_cache_is_large() -> None:
    with _extension.force_isa("v4"), caches_for("spread", 32 << 20):
        for samples, regime in ((12, "quads"), (13, "tiles"), (24, "quads"), (26, "tiles"), (128, "tiles")):
            case = dense_capsules("", samples, 9, 4, 12, 16)
            assert regime_of(case, case.inputs(torch.float32)) == regime


FAULTS = """
import resource
import torch
from caps_kernels.functional import dense_capsules

u, weight = torch.randn(320, 340, 1, requires_grad=True), torch.randn(340, 32, 1, 16, requires_grad=True)
for call in range(15):
    if call == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    v = dense_capsules(u, weight, backend="cpp")
    torch.autograd.grad(v.sum(), (u, weight))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_beyond_64_mib_is_kept_while_forward_and_backward_take_turns() -> None:
    # 56 MiB of coefficients, 16 of sums and of copies of s, V and g; made anew for every call they cost thousands of
    # page faults.
    environment = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    assert int(run.stdout) < 1500

"""What the plans of backend "cuda" move through memory, and the least time that takes; the READMEs of ops show it.

    python -m tests.cuda_host.counts

A plan's bytes are those that go to memory where caches hold what neighbouring blocks share (W, u, V) and not the votes.
Its time is bytes over bandwidth, or FLOP over peak where that is longer; the limit is the same for every tensor read or
written once. Launches and barriers, microseconds each, are in neither. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS = {"A100": (2.039e12, 19.5e12), "H100": (3.35e12, 67e12), "B200": (8.0e12, 75e12)}
"""Bytes a second of memory and float32 FLOP a second, of the SXM modules by NVIDIA's datasheets."""


@dataclass(frozen=True)
class Pass:
    """A forward or backward in float32: numbers read and written by the plan, the least there can be, and FLOP."""

    name: str
    launches: str
    numbers: int
    least: int
    flop: int

    def row(self) -> str:
        """Of the table."""
        times = [
            " / ".join(f"{1e6 * max(4 * n / bandwidth, self.flop / peak):.0f}" for bandwidth, peak in GPUS.values())
            for n in (self.numbers, self.least)
        ]
        sizes = f"{4e-6 * self.numbers:.0f} | {4e-6 * self.least:.0f} | {1e-6 * self.flop:.0f}"
        return f"| {self.name} | {self.launches} | {sizes} | {times[0]} | {times[1]} |"


def passes(b: int = 128, i: int = 1152, j: int = 10, d: int = 8, e: int = 16, r: int = 3) -> list[Pass]:
    """The passes of the three ops of given votes, at the sizes of the 2017 network by default."""
    u, weight, votes = b * i * d, i * j * d * e, b * i * j * e
    chunks = max(
        1, min(2**17 * 4 // (i * j * e), -(-b // 32))
    )  # of the rows of grad_weight, as predict_votes.cu cuts them
    parts = chunks * weight if chunks > 1 else 0
    return [
        Pass("squash forward", "1", 2 * u, 2 * u, 6 * u),
        Pass("squash backward", "1", 3 * u, 3 * u, 11 * u),
        Pass("predict_votes forward", "1", u + weight + votes, u + weight + votes, 2 * votes * d),
        Pass(
            "predict_votes backward",
            "1 or 2",
            votes + 2 * u + 2 * weight + 2 * parts,
            votes + 2 * u + 2 * weight,
            4 * votes * d,
        ),
        Pass("dynamic_routing forward", "1", r * votes, votes, 2 * votes * (2 * r - 1)),
        Pass("dynamic_routing backward", "1", (r + 1) * votes, 2 * votes, 2 * votes * (5 * r - 4)),
    ]


if __name__ == "__main__":
    print(f"| float32 | launches | MB | least MB | MFLOP | µs on {' / '.join(GPUS)} | the limit |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(one.row() for one in passes()))

"""The plans of dense_capsules on backend "cuda", what they compute and move, and the least time that takes.

    python -m tests.cuda_host.dense_counts

Plans are asked of the source itself, compiled for the host. A predicted time is FLOP over peak, divided by the share
of a GPU's places for blocks that the items fill in whole rounds, or bytes over bandwidth where that is longer; the
limit has û made once in forward and in backward, every tensor read or written once, and all places filled. Launches,
barriers, waits for shared memory and partial sums (which the second level cache holds) are in neither. Nothing here
was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.cuda_host import host

# Processors; bytes a second of memory; float32 and 16-bit tensor FLOP a second: SXM modules, NVIDIA's datasheets.
GPUS = {
    "A100": (108, 2.039e12, 19.5e12, 312e12),
    "H100": (132, 3.35e12, 67e12, 990e12),
    "B200": (148, 8.0e12, 75e12, 2250e12),
}
SHAPES = ((128, 1152, 10, 8, 16), (16, 1152, 59, 8, 16))
ITERATIONS = 3
BLOCKS = {"forward": 2, "backward": 1}
"""Blocks that share a processor: what the table of tiles asks of the compiler for J up to 10, and one for larger J."""


@dataclass(frozen=True)
class Work:
    """FLOP of products with W, of all the rest, and numbers of 4 or 2 bytes moved to or from memory."""

    products: float
    rest: float
    bytes: float

    def seconds(self, gpu: str, tensor_cores: bool, filled: float = 1.0) -> float:
        """The least time on a GPU of whose places a share is filled."""
        _, bandwidth, peak, tensor_peak = GPUS[gpu]
        arithmetic = self.products / (tensor_peak if tensor_cores else peak) + self.rest / peak
        return max(arithmetic / filled, self.bytes / bandwidth)


def share_filled(items: int, places: int) -> float:
    """Of the places of a GPU, over all rounds that the items take."""
    return items / (-(-items // places) * places)


def rows(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[str]:
    """Of the table: forward and backward."""
    b, i, j, d, e = shape
    r, n, size = ITERATIONS, b * i * j * e, torch.finfo(dtype).bits // 8
    u, weight = torch.empty(b, i, d, dtype=dtype), torch.empty(i, j, d, e, dtype=dtype)
    with host.load("dense_capsules").settings(shared_limit=163 * 1024):  # of an A100
        plan = torch.ops.caps_kernels_cuda_host.dense_capsules_plan(u, weight, 1, r)
    samples, _, _, tensor_cores, _, threads, items, shared, groups, gradient_shared = plan
    moved = size * (u.numel() + weight.numel())
    coefficients = 4 * n * (r - 1) + 2 * n * (2 * r - 1)
    made = {
        # Forward makes û in each pass and sums it at once in the first.
        "forward": (Work(2 * n * d * r, 4 * n * (r - 1), moved), Work(2 * n * d, 2 * n * (2 * r - 1), moved)),
        # Backward makes û in each pass and for the gradients; the products of gû with W and u are by FMA.
        "backward": (
            Work(2 * n * d * r, 6 * n * (r - 1) + coefficients + 4 * n * d, 2 * moved),
            Work(2 * n * d, 2 * n * (5 * r - 4) + 4 * n * d, 2 * moved),
        ),
    }
    found = []
    for name, (work, least) in made.items():
        blocks = BLOCKS[name] if j <= 10 else 1
        count = items if name == "forward" else groups
        shares = {gpu: share_filled(count, blocks * values[0]) for gpu, values in GPUS.items()}
        predicted = [work.seconds(gpu, tensor_cores, shares[gpu]) for gpu in GPUS]
        limits = [least.seconds(gpu, tensor_cores) for gpu in GPUS]
        times = [" / ".join(f"{1e6 * seconds:.0f}" for seconds in some) for some in (predicted, limits)]
        kib = (shared if name == "forward" else gradient_shared) / 1024
        flop = f"{1e-6 * work.products:.0f} + {1e-6 * work.rest:.0f}"
        what = f"{name} B={b} J={j} {str(dtype)[6:]} | {samples} | {count} | {threads} × {blocks}"
        found.append(f"| {what} | {kib:.0f} | {flop} | {1e-6 * work.bytes:.1f} | {times[0]} | {times[1]} |")
    return found


if __name__ == "__main__":
    print("| I=1152 D=8 E=16 R=3 | samples | items | threads | KiB | MFLOP | MB | µs on " + " / ".join(GPUS), end="")
    print(" | the limit |\n|---|---|---|---|---|---|---|---|---|")
    for sizes in SHAPES:
        for kind in (torch.float32, torch.bfloat16):
            print("\n".join(rows(sizes, kind)))

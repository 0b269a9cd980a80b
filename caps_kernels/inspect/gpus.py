"""The GPUs whose code is inspected: what a multiprocessor holds, and what their instructions are called."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The limits of a multiprocessor of a GPU; on AMD, of one SIMD unit and of the LDS that its four share."""

    registers: int
    """32-bit registers of a lane, over all warps."""
    granularity: int
    """Registers of a thread are handed out so many at a time."""
    warps: int
    programs: int
    shared: int
    """Bytes; each program takes a kibibyte more on NVIDIA GPUs."""
    amd: bool = False


GPUS = {
    "sm_80": Gpu(2048, 8, 64, 32, 164 << 10),
    "sm_90": Gpu(2048, 8, 64, 32, 228 << 10),
    "sm_100": Gpu(2048, 8, 64, 32, 228 << 10),
    "gfx942": Gpu(512, 8, 8, 16, 64 << 10, amd=True),
}
"""A100, H100, B200 and MI300."""


def occupancy(gpu: Gpu, warps: int, registers: int, shared: int) -> int:
    """Percent of the most warps a multiprocessor (on AMD, a SIMD unit) holds."""
    each = max(1, -(-registers // gpu.granularity) * gpu.granularity)
    by_registers = gpu.registers // each
    if gpu.amd:
        # A program's warps are spread over four SIMD units, which share the LDS.
        held = gpu.shared // shared * -(-warps // 4) if shared else gpu.warps
        return 100 * min(gpu.warps, by_registers, held) // gpu.warps
    programs = min(gpu.programs, by_registers // warps, gpu.warps // warps, gpu.shared // (shared + 1024))
    return 100 * programs * warps // gpu.warps


def sass_counts(sass: str) -> dict[str, int]:
    """In NVIDIA's SASS: loads from global memory, those of 128 bits, and instructions of the matrix units."""
    loads = re.findall(r"\bLDG\.[\w.]+", sass) + re.findall(r"\bLDGSTS\.[\w.]+", sass)
    matrix = re.findall(r"\b(?:[HIDQ]MMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b", sass)
    return {"wide_loads": sum(".128" in load for load in loads), "loads": len(loads), "matrix": len(matrix)}

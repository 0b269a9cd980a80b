"""Compile the Triton kernels of a call ahead of time, for GPUs that are not there, and read what the compiler made."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor

from caps_kernels import _triton
from caps_kernels.inspect.calls import calls
from caps_kernels.inspect.gpus import GPUS, occupancy, sass_counts
from caps_kernels.inspect.table import Row, dtype_name

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""NVIDIA's cuobjdump and nvdisasm, which come with Triton."""


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def samples(op: str) -> Sequence[_triton.Sample]:
    """The calls that an op's Triton kernels name."""
    found: Sequence[_triton.Sample] = module(op).SAMPLES
    return found


def module(op: str) -> Any:
    """An op's Triton module."""
    return importlib.import_module(f"caps_kernels.ops.{op}.triton")


def rows(op: str, sample: _triton.Sample, dtype: torch.dtype, target: str) -> Iterator[Row]:
    """One row for each kernel of a sample's call, forward and backward."""
    seen: dict[str, list[Any]] = {}
    for launch in recorded(op, sample, dtype, target):
        source = _source(launch, target)
        others = seen.setdefault(launch.name, [])
        if source.hash() in others:
            continue
        others.append(source.hash())
        kernel = launch.name if len(others) == 1 else f"{launch.name} ({len(others)})"
        compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
        read = _read_amd if target.startswith("gfx") else _read_nvidia
        numbers = read(compiled)
        held = occupancy(GPUS[target], launch.warps, numbers["registers"], numbers["shared"])
        names = (op, sample.name, kernel, _tile(launch), dtype_name(dtype), target)
        yield Row(*names, occupancy=held, **numbers)  # type: ignore[arg-type]


def recorded(op: str, sample: _triton.Sample, dtype: torch.dtype, target: str) -> list[_triton.Launch]:
    """The launches of a sample's call, forward and backward, on a GPU that need not be there."""
    with _triton.recording(target) as launches:
        forward, backward = calls(op, sample, dtype, "meta", "triton")
        results = forward()
        backward(torch.ones_like(results[0]), results)
    return launches


def _source(launch: _triton.Launch, target: str) -> ASTSource:
    """What Triton would compile for a launch: it does so for each type, alignment and integer 1 among the arguments."""
    backend = make_backend(TARGETS[target])
    given = list(launch.args)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for n, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(n,)] = "constexpr", launch.constants[parameter.name]
            continue
        value = given.pop(0)
        # Tensors on "meta" have no address; memory of new tensors is aligned.
        value = MockTensor(value.dtype) if isinstance(value, Tensor) else value
        kind, key = native_specialize_impl(
            type(backend),
            value,
            parameter.is_const,
            not parameter.do_not_specialize,
            not parameter.do_not_specialize_on_alignment,
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(n,)] = value
        elif isinstance(key, str):
            attributes[(n,)] = backend.parse_attr(key)
    return ASTSource(launch.kernel, signature, constants, attributes)


def _tile(launch: _triton.Launch) -> str:
    """The sizes of a kernel's tiles."""
    sizes = {
        name: value
        for name, value in launch.constants.items()
        if type(value) is int and len(name) > 1 and not name[-1].isdigit() and name != "INNER"
    }
    return " ".join([*(f"{name}={value}" for name, value in sizes.items()), f"warps={launch.warps}"])


def _read_nvidia(compiled: Any) -> dict[str, int]:
    """Resources and instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        # Without an analysis of the flow of data; cuobjdump has it made, which takes longer.
        sass = _run("nvdisasm", "-c", "-ndf", file.name)
    return {**_usage(usage, compiled.metadata.shared), **sass_counts(sass)}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _usage(text: str, shared: int) -> dict[str, int]:
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, static, local = map(int, found.groups())
    return {"registers": registers, "stack": stack + local, "shared": max(static, shared)}


def _read_amd(compiled: Any) -> dict[str, int]:
    """Resources and instructions of AMD assembly."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    loads = re.findall(r"\b(?:global|buffer|flat)_load_\w+", text)
    spilled = 4 * number("vgpr_spill_count")  # Scalar registers are spilled to vector ones.
    return {
        "registers": number("vgpr_count"),
        "stack": max(number("private_segment_fixed_size"), spilled),
        "shared": compiled.metadata.shared,
        "wide_loads": sum(load.endswith("x4") for load in loads),
        "loads": len(loads),
        "matrix": len(re.findall(r"\bv_mfma_\w+", text)),
    }

"""Read what nvcc made of the CUDA kernels, from the code in the built library; no GPU is needed."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from caps_kernels import _extension
from caps_kernels.inspect.gpus import GPUS, occupancy, sass_counts
from caps_kernels.inspect.table import Row, dtype_name

DTYPES = {"float": torch.float32, "double": torch.float64, "BFloat16": torch.bfloat16, "Float16": torch.float16}
PARAMETERS = {
    "squash_rows": ("pack", "backward", "single"),
    "squash_columns": ("backward",),
    "votes_forward": ("pack", "samples"),
    "votes_backward": ("pack",),
    "votes_backward_u": ("pack", "samples"),
    "votes_backward_weight": ("pack",),
    "votes_add_chunks": (),
    "routing_forward": ("pack",),
    "routing_backward": ("pack",),
    "routing_forward_warp": ("pack", "lanes", "packs"),
    "routing_backward_warp": ("pack", "lanes", "packs"),
    "DenseTile": ("e_lanes", "rows", "width", "parents", "warps", "blocks", "keep", "tensor_cores"),
    "DensePlain": (),
}
"""What the template arguments after the dtype mean, of kernels and of the tiles that kernels of dense_capsules have."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as its signature names it."""

    function: str
    tile: str
    """"DenseTile" or "DensePlain", or empty where kernels are made for no tile."""
    dtype: torch.dtype
    values: Mapping[str, int]
    """The other template arguments; true is 1."""

    @property
    def samples_columns_parents(self) -> tuple[int, int, int]:
        """Of a DenseTile: the samples, numbers e and parents that it has room for."""
        v = self.values
        return 32 // v["e_lanes"] * v["rows"], v["e_lanes"] * v["width"], v["warps"] * v["parents"]

    def __str__(self) -> str:
        """Function and template arguments but for the dtype, as in "squash_rows pack=4 single"."""
        if self.tile == "DensePlain":
            return f"{self.function} plain"
        if self.tile == "DenseTile":
            samples, columns, parents = self.samples_columns_parents
            return f"{self.function} {samples}x{columns} J={parents}"
        flags = ("backward", "single")
        words = [name if name in flags else f"{name}={value}" for name, value in self.values.items() if value]
        return " ".join([self.function, *words])


def kernel_of(signature: str) -> Kernel:
    """The kernel of a demangled signature.

    Raises:
        ValueError: its template arguments are none that PARAMETERS names.
    """
    found = re.search(r"(\w+)<(.*)>\s*\(", signature)
    function, words = (found[1], re.findall(r"\w+(?!\w*::)", found[2])) if found else (signature, [])
    tile = words.pop(0) if words and words[0].startswith("Dense") else ""
    names = PARAMETERS.get(tile or function)
    if names is None or len(words) != 1 + len(names) or words[0] not in DTYPES:
        raise ValueError(f"caps_kernels.inspect does not know the template arguments of {signature}")
    values = {"true": 1, "false": 0}
    numbers = [values[word] if word in values else int(word) for word in words[1:]]
    return Kernel(function, tile, DTYPES[words[0]], dict(zip(names, numbers, strict=True)))


def missing() -> str | None:
    """Why there is nothing to read or to read it with, or None."""
    reason = _extension.MISSING["cuda"]
    for name in ("cuobjdump", "nvdisasm", "c++filt"):
        if reason is None and tool(name) is None:
            reason = f"there is no {name} on the PATH" + ("" if name == "c++filt" else ", and none came with Triton")
    if reason is None and not targets():
        reason = f"the library was built for {_library().architectures()}, none of {', '.join(GPUS)}"
    return reason


def tool(name: str) -> str | None:
    """A program on the PATH, where the CUDA toolkit and the compiler's are, or of those that come with Triton."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in triton.submodule_search_locations or ()] if triton else []
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


def targets() -> list[str]:
    """The GPUs for which the library has code."""
    return [name for name in _library().architectures().split() if name in GPUS]


def _library() -> Any:
    return importlib.import_module("caps_kernels._cuda")


def rows(op: str, target: str) -> list[Row]:
    """One row for each kernel of an op, as it is launched at most."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = _extract(op, target, Path(folder))
        usage = usages(_run("cuobjdump", "-res-usage", str(cubin)))
        threads = most_threads(_run("cuobjdump", "-elf", str(cubin)))
        code = sections(_run("nvdisasm", "-c", str(cubin)))
    kernels = {name: kernel_of(signature) for name, signature in _demangled(list(usage)).items()}
    found = []
    for name in sorted(kernels, key=lambda name: (str(kernels[name]), dtype_name(kernels[name].dtype))):
        kernel = kernels[name]
        sample, dynamic = launch(op, kernel)
        numbers = {**usage[name], **sass_counts(code[name])}
        numbers["stack"] = max(numbers["stack"], 4 * local_accesses(code[name]))
        # From sm_90 on, a kibibyte that the system takes of each block is in the static memory of those that have any.
        numbers["shared"] = dynamic + max(0, numbers["shared"] - (0 if target == "sm_80" else 1024))
        held = occupancy(GPUS[target], -(-threads[name] // 32), numbers["registers"], numbers["shared"])
        names = (op, sample, str(kernel), f"threads={threads[name]}", dtype_name(kernel.dtype), target)
        found.append(Row(*names, occupancy=held, **numbers))  # type: ignore[arg-type]
    return found


def launch(op: str, kernel: Kernel) -> tuple[str, int]:
    """A call for which a kernel is launched with all of its threads, and the bytes of dynamic shared memory of its
    blocks then, as the library plans them, with B=128 I=1152 R=3.
    """
    ops = torch.ops.caps_kernels_cuda
    shared: Sequence[int]
    if op == "dense_capsules":
        _, columns, parents = kernel.samples_columns_parents if kernel.tile == "DenseTile" else (0, 16, 100)
        u = torch.empty(128, 1152, 8, dtype=kernel.dtype, device="meta")
        weight = torch.empty(1152, parents, 8, columns, dtype=kernel.dtype, device="meta")
        shared = ops.dense_capsules_shared(u, weight, 1)
        order = ["dense_forward", "dense_backward", "dense_gradients"]
        return f"J={parents} D=8 E={columns}", shared[order.index(kernel.function)]
    if op == "dynamic_routing":
        v = kernel.values
        # 15 numbers cannot be read in packs, and teams of lanes do not hold the packs of 24.
        parents, columns = (v["pack"] * v["lanes"] * v["packs"] // 16, 16) if "lanes" in v else (10, 24)
        columns = columns if v["pack"] > 1 else 15
        votes = torch.empty(128, 1152, parents, columns, dtype=kernel.dtype, device="meta")
        shared = ops.dynamic_routing_shared(votes, 3)
        return f"J={parents} E={columns}", shared["backward" in kernel.function]
    return "any", 0


def usages(text: str) -> dict[str, dict[str, int]]:
    """In `cuobjdump -res-usage`, by kernel: registers of a thread, bytes of its stack, and static shared memory."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: {"registers": int(registers), "stack": int(stack) + int(local), "shared": int(shared)}
        for name, registers, stack, shared, local in re.findall(pattern, text)
    }


def most_threads(text: str) -> dict[str, int]:
    """In `cuobjdump -elf`, by kernel: the threads that its launch bounds allow a block."""
    found: dict[str, int] = {}
    kernel = ""
    pattern = r"^\.nv\.info\.(\S+)$|EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+(0x\w+)"
    for match in re.finditer(pattern, text, re.MULTILINE):
        if match[1]:
            kernel = match[1]
        else:
            found[kernel] = int(match[2], 16)
    return found


def sections(text: str) -> dict[str, str]:
    """The code of each kernel in the output of `nvdisasm -c`, with the functions it calls."""
    pieces = re.split(r"^\s*\.section\s+\.text\.([^\s,]+),.*$", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def local_accesses(sass: str) -> int:
    """Loads from the stack and stores to it: spills, and arrays whose indices were not known to the compiler."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def _demangled(names: Sequence[str]) -> dict[str, str]:
    text = _run("c++filt", input_text="\n".join(names))
    return dict(zip(names, text.splitlines(), strict=True))


def _extract(op: str, target: str, folder: Path) -> Path:
    _run("cuobjdump", "-xelf", f"{op}.", str(Path(_library().__file__).resolve()), cwd=folder)
    (found,) = [path for path in folder.iterdir() if path.name.endswith(f".{target}.cubin")]
    return found


def _run(name: str, *arguments: str, input_text: str | None = None, cwd: Path | None = None) -> str:
    command = [str(tool(name)), *arguments]
    return subprocess.run(command, input=input_text, cwd=cwd, capture_output=True, text=True, check=True).stdout

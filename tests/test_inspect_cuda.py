"""`python -m caps_kernels.inspect --backend cuda`: what is read of the built library, without a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from caps_kernels import _extension, backends
from caps_kernels.inspect import __main__ as command
from caps_kernels.inspect import built, table
from caps_kernels.inspect.gpus import GPUS, occupancy, sass_counts

readable = pytest.mark.skipif(built.missing() is not None, reason=f"backend cuda cannot be read: {built.missing()}")

SPACE = "void caps::gpu::(anonymous namespace)::"
TILE = "caps::gpu::DenseTile<caps::BFloat16, 4, 2, 4, 4, 16, 1, false, true>"


@pytest.mark.parametrize(
    ("signature", "name", "dtype"),
    [
        (f"{SPACE}dense_forward<{TILE} >(caps::gpu::DenseArgs)", "dense_forward 16x16 J=64", torch.bfloat16),
        (f"{SPACE}dense_backward<{TILE} >(caps::gpu::DenseArgs)", "dense_backward 16x16 J=64", torch.bfloat16),
        (f"{SPACE}dense_gradients<{TILE}>(caps::gpu::DenseArgs)", "dense_gradients 16x16 J=64", torch.bfloat16),
        (
            f"{SPACE}dense_forward<caps::gpu::DensePlain<double> >(caps::gpu::DenseArgs)",
            "dense_forward plain",
            torch.float64,
        ),
        (f"{SPACE}squash_rows<float, 4, true, false>(SquashArgs)", "squash_rows pack=4 backward", torch.float32),
        (f"{SPACE}squash_rows<float, 4, false, true>(SquashArgs)", "squash_rows pack=4 single", torch.float32),
        (
            f"{SPACE}routing_forward_warp<float, 4, 8, 5>(caps::gpu::RoutingArgs)",
            "routing_forward_warp pack=4 lanes=8 packs=5",
            torch.float32,
        ),
        (f"{SPACE}votes_forward<caps::Float16, 8, 16>(VotesArgs)", "votes_forward pack=8 samples=16", torch.float16),
        (f"{SPACE}votes_add_chunks<caps::Float16>(VotesArgs)", "votes_add_chunks", torch.float16),
    ],
)
def test_names_tell_kernels_and_tiles_apart(signature: str, name: str, dtype: torch.dtype) -> None:
    kernel = built.kernel_of(signature)
    assert (str(kernel), kernel.dtype) == (name, dtype)


@pytest.mark.parametrize("signature", ["f()", "void other<float>(Args)", "void squash_rows<float, 4>(SquashArgs)"])
def test_a_kernel_that_is_not_known_is_an_error_that_shows_it(signature: str) -> None:
    with pytest.raises(ValueError, match="template arguments") as error:
        built.kernel_of(signature)
    assert signature in str(error.value)


def test_registers_stack_and_shared_memory_are_read() -> None:
    text = """
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z5firstv:
  REG:40 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6secondv:
  REG:128 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert built.usages(text) == {
        "_Z5firstv": {"registers": 40, "stack": 24, "shared": 1024},
        "_Z6secondv": {"registers": 128, "stack": 0, "shared": 0},
    }


def test_launch_bounds_are_read() -> None:
    bounds = "\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t{} 0x1 0x1 \n"
    other = "\t<0x14>\n\tAttribute:\tEIATTR_MIN_STACK_SIZE\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0x9 0x0\n"
    text = f".nv.info\n{other}.nv.info._Z5firstv\n{other}{bounds.format('0x100')}"
    text += f".nv.info._Z6secondv\n{bounds.format('0x140')}"
    assert built.most_threads(text) == {"_Z5firstv": 256, "_Z6secondv": 320}


def test_instructions_are_counted_by_kernel() -> None:
    text = """
//--------------------- .text._Z5firstv --------------------------
	.section	.text._Z5firstv,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=40"
.text._Z5firstv:
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0010*/              @!P0 LDG.E R8, [R2.64] ;
        /*0020*/                   HMMA.1688.F32.BF16 R4, R4, R8, R4 ;
	.section	.text._Z6secondv,"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64], P0 ;
        /*0010*/                   LDS.128 R8, [R2] ;
        /*0020*/                   STL [R1+0x4], R8 ;
        /*0030*/                   LDL.LU R8, [R1+0x4] ;
"""
    code = built.sections(text)
    assert list(code) == ["_Z5firstv", "_Z6secondv"]
    assert sass_counts(code["_Z5firstv"]) == {"wide_loads": 1, "loads": 2, "matrix": 1}
    assert [built.local_accesses(sass) for sass in code.values()] == [0, 2]
    assert sass_counts(code["_Z6secondv"]) == {"wide_loads": 1, "loads": 1, "matrix": 0}


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "percent"),
    [
        (96, 320, 0, 31),  # 20 of 64 warps
        (97, 320, 0, 15),
        (32, 256, 0, 100),
        (32, 256, 40 << 10, 50),  # with the system's kibibyte 41 KiB a block: 4 in 164 KiB
        (32, 256, 41 << 10, 37),
        (128, 512, 0, 25),
    ],
)
def test_occupancy_of_an_a100(registers: int, threads: int, shared: int, percent: int) -> None:
    assert occupancy(GPUS["sm_80"], threads // 32, registers, shared) == percent


def test_without_the_library_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(_extension.MISSING, "cuda", "not built: no nvcc")
    assert command.main(["--backend", "cuda"]) == 2
    assert capsys.readouterr().err == "cuda: not built: no nvcc\n"


def test_without_the_disassembler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_extension.MISSING, "cuda", None)
    monkeypatch.setattr(built, "tool", lambda name: None if name == "nvdisasm" else "/usr/bin/true")
    assert built.missing() == "there is no nvdisasm on the PATH, and none came with Triton"


@readable
@pytest.mark.parametrize("op", backends.ops())
def test_every_kernel_of_the_library_has_a_name_of_its_own_and_a_budget(op: str) -> None:
    keys = Counter(row.key for row in built.rows(op, built.targets()[0]))
    assert keys
    assert max(keys.values()) == 1, keys.most_common(1)
    assert set(keys) <= set(table.read_budgets(table.budget_path(op, "cuda")))


@readable
def test_squash_keeps_its_budget() -> None:
    rows = command.inspect("cuda", ["squash"], [], [], [], 1)
    assert command.judge(rows, "cuda") == 0
    assert {row.target for row in rows} == set(built.targets())
    wide = [row for row in rows if "pack=4" in row.kernel or "pack=8" in row.kernel]
    assert wide
    assert all(row.wide_loads for row in wide)


@readable
def test_a_breach_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(table, "read_budgets", lambda path: {})
    target = built.targets()[0]
    arguments = ["--backend", "cuda", "--op", "squash", "--target", target, "--dtype", "float32", "--jobs", "1"]
    assert command.main(arguments) == 1
    out = capsys.readouterr()
    assert "cuda: 10 kernels, 10 breaches of budgets" in out.out
    assert f"squash_columns backward for any, float32, {target}: no budget" in out.err

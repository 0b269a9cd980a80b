"""What setup.py decides and reports, and what the package makes of the report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from caps_kernels import _extension

pytest.importorskip("setuptools", reason="setup.py needs setuptools")

ROOT = Path(__file__).resolve().parents[1]
CHOICES = ("auto", "cpu", "cuda", "none")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, for an empty folder and a machine without compilers."""
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("CAPS_BUILD", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(module, "torch_cuda", lambda: "13.0")
    tools(monkeypatch)
    return module


def tools(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these programs and no others be on the PATH."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in names else None)


def add_sources(root: Path) -> None:
    for path in ("csrc/cpu/squash.cpp", "csrc/cuda/squash.cu"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("", encoding="utf-8")


@pytest.mark.parametrize("choice", CHOICES)
def test_what_was_not_asked_for_is_not_built(
    script: ModuleType, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sources(tmp_path)
    tools(monkeypatch, "c++", "nvcc")
    reason = f"not built: CAPS_BUILD={choice} when the package was installed"
    assert script.why_not("cpp", choice) == (None if choice in ("auto", "cpu") else reason)
    assert script.why_not("cuda", choice) == (None if choice in ("auto", "cuda") else reason)


def test_a_version_without_sources_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(monkeypatch, "c++", "nvcc")
    assert script.why_not("cpp", "auto") == "this version has no C++ kernels"
    assert script.why_not("cuda", "auto") == "this version has no CUDA C++ kernels"


def test_a_missing_compiler_is_the_reason(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_sources(tmp_path)
    assert script.why_not("cpp", "auto") == "not built: no C++ compiler was found when the package was installed"
    assert script.why_not("cuda", "auto") == "not built: nvcc was not found when the package was installed"
    for name in ("c++", "g++", "clang++"):
        tools(monkeypatch, name)
        assert script.why_not("cpp", "auto") is None
        assert script.why_not("cuda", "auto") is not None
    monkeypatch.setenv("CXX", "my-compiler")
    tools(monkeypatch, "my-compiler")
    assert script.why_not("cpp", "auto") is None


def build(script: ModuleType, build_lib: Path, **options: Any) -> None:
    command = script.BuildKernels(script.PackageWithKernels({"name": "caps_kernels"}))
    command.ensure_finalized()
    command.build_lib = str(build_lib)
    for name, value in options.items():
        setattr(command, name, value)
    command.run()


def report_in(folder: Path) -> Any:
    path = folder / "caps_kernels" / "_build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@pytest.mark.parametrize(
    "options", [{}, {"editable_mode": True}, {"inplace": True}], ids=["wheel", "editable", "inplace"]
)
def test_the_report_goes_where_the_package_is(script: ModuleType, options: dict[str, bool], tmp_path: Path) -> None:
    build(script, tmp_path / "lib", **options)
    wanted = {"cpp": "this version has no C++ kernels", "cuda": "this version has no CUDA C++ kernels"}
    assert report_in(tmp_path) == (wanted if options else None)
    assert report_in(tmp_path / "lib") == (None if options else wanted)


def test_none_builds_nothing_and_says_why(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_sources(tmp_path)
    tools(monkeypatch, "c++", "nvcc")
    monkeypatch.setenv("CAPS_BUILD", "none")
    build(script, tmp_path)
    reason = "not built: CAPS_BUILD=none when the package was installed"
    assert report_in(tmp_path) == {"cpp": reason, "cuda": reason}


@pytest.mark.parametrize(("choice", "kernels"), [("cpu", "C++"), ("cuda", "CUDA C++")])
def test_what_was_asked_for_and_cannot_be_built_fails(
    script: ModuleType, choice: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPS_BUILD", choice)
    with pytest.raises(SystemExit) as raised:
        build(script, tmp_path)
    assert str(raised.value) == f"CAPS_BUILD={choice}, but this version has no {kernels} kernels"
    add_sources(tmp_path)
    with pytest.raises(SystemExit, match=f"CAPS_BUILD={choice}, but not built: .* found"):
        build(script, tmp_path)
    assert report_in(tmp_path) is None


@pytest.mark.parametrize("choice", ["gpu", "CPU", "cpu,cuda", ""])
def test_unknown_choices_are_refused(
    script: ModuleType, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPS_BUILD", choice)
    with pytest.raises(SystemExit, match=f"CAPS_BUILD must be one of auto, cpu, cuda, none, got '{choice}'"):
        build(script, tmp_path)
    assert report_in(tmp_path) is None


COMPILER = """#!/bin/sh
echo "$@" >> {log}
test -e {broken} && echo "squash.cpp:1:2: error: expected unqualified-id" && exit 1
while [ $# -gt 1 ]; do
  case $1 in
    -o) : > "$2" ;;
    -c) source=$2 ;;
    -MF) echo "x.o: $source {header}" > "$2" ;;
  esac
  shift
done
"""


@pytest.fixture
def compiler(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes empty files and a log, which is returned; it fails while the file "broken" is there."""
    add_sources(tmp_path)
    for name in ("csrc/library.cpp", "csrc/cuda/library.cu", "header.h"):
        (tmp_path / name).write_text("", encoding="utf-8")
    log, path = tmp_path / "log", tmp_path / "compiler"
    names = {"log": log, "broken": tmp_path / "broken", "header": tmp_path / "header.h"}
    path.write_text(COMPILER.format(**names), encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setattr(shutil, "which", lambda name: name if name == str(path) else None)
    return log


def compiled(log: Path) -> list[str]:
    """What was compiled since the last call, "link" for the library."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    words = [line.split() for line in lines]
    return sorted("link" if "-shared" in w else Path(w[w.index("-o") + 1]).stem for w in words)


def test_only_what_has_changed_is_compiled_again(script: ModuleType, compiler: Path, tmp_path: Path) -> None:
    everything = ["library", "link", "squash", *(f"squash-{name}" for name in script.instruction_sets())]
    build(script, tmp_path / "lib")
    assert compiled(compiler) == sorted(everything)
    assert (tmp_path / "lib/caps_kernels/_cpp.abi3.so").exists()
    assert report_in(tmp_path / "lib")["cpp"] == "built"
    build(script, tmp_path / "lib")
    assert compiled(compiler) == ["link"]
    for changed, again in (("csrc/library.cpp", ["library", "link"]), ("header.h", sorted(everything))):
        newer = time.time() + 10
        os.utime(tmp_path / changed, (newer, newer))
        build(script, tmp_path / "lib")
        assert compiled(compiler) == again
        os.utime(tmp_path / changed, (0, 0))
        build(script, tmp_path / "lib")
        assert compiled(compiler) == ["link"]


def test_other_flags_compile_everything_again(
    script: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(script, tmp_path)
    first = compiled(compiler)
    monkeypatch.setenv("CXXFLAGS", "-DNEW -g")
    build(script, tmp_path)
    assert "-DNEW -g" in compiler.read_text(encoding="utf-8")
    assert compiled(compiler) == first


def test_a_failed_build_leaves_what_the_compiler_said(
    script: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").touch()
    build(script, tmp_path / "lib")
    reason = report_in(tmp_path / "lib")["cpp"]
    assert reason.startswith("not built: ")
    assert "squash.cpp:1:2: error: expected unqualified-id" in reason
    monkeypatch.setenv("CAPS_BUILD", "cpu")
    with pytest.raises(SystemExit, match=r"CAPS_BUILD=cpu, but not built: .*expected unqualified-id"):
        build(script, tmp_path / "lib")
    (tmp_path / "broken").unlink()
    build(script, tmp_path / "lib")
    assert report_in(tmp_path / "lib")["cpp"] == "built"


NVCC = """#!/bin/sh
case "$*" in
  --dryrun*) echo '#$ _SPACE_= '; echo '#$ TOP={top}'; exit 0 ;;
  --list-gpu-code*) printf '%s\\n' {codes}; exit 0 ;;
esac
. {compiler}
"""


@pytest.fixture
def nvcc(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc as `compiler`, found through a script elsewhere that runs it; its toolkit is returned."""
    top = tmp_path / "toolkit"
    (top / "bin").mkdir(parents=True)
    real, wrapper = top / "bin" / "nvcc", tmp_path / "nvcc"
    names = {"top": top / "bin" / "..", "codes": "sm_80 sm_90", "compiler": tmp_path / "compiler"}
    real.write_text(NVCC.format(**names), encoding="utf-8")
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n', encoding="utf-8")
    for path in (real, wrapper):
        path.chmod(0o755)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: str(wrapper) if name == "nvcc" else found(name))
    return top


def test_a_torch_without_cuda_is_the_reason(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sources(tmp_path)
    tools(monkeypatch, "c++", "nvcc")
    monkeypatch.setattr(script, "torch_cuda", lambda: None)
    assert script.why_not("cuda", "auto") == "not built: the torch it was installed with has no CUDA"
    assert script.why_not("cpp", "auto") is None


def test_the_toolkit_is_found_behind_a_wrapper(script: ModuleType, nvcc: Path) -> None:
    assert script.toolkit() == nvcc


def test_an_nvcc_that_does_not_run_is_the_reason(script: ModuleType, nvcc: Path, tmp_path: Path) -> None:
    (nvcc / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence; exit 3\n", encoding="utf-8")
    build(script, tmp_path / "lib")
    report = report_in(tmp_path / "lib")
    assert report["cuda"].startswith("not built: nvcc does not say where its toolkit is (exit code 3): no licence")
    assert report["cpp"] == "built"


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("", ["sm_80", "sm_90", "compute_90"]),
        ("8.6", ["sm_86"]),
        ("7.5 9.0a+PTX", ["sm_75", "sm_90a", "compute_90a"]),
        ("8.0;8.9,10.0", ["sm_80", "sm_89", "sm_100"]),
    ],
)
def test_architectures_are_those_asked_for(
    script: ModuleType, nvcc: Path, asked: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    found = script.architectures(nvcc / "bin" / "nvcc")
    assert list(found) == wanted
    last = wanted[-1].split("_")[1]
    assert found[wanted[-1]] == ["-gencode", f"arch=compute_{last},code={wanted[-1]}"]


def test_architectures_that_make_no_sense_are_the_reason(
    script: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    build(script, tmp_path / "lib")
    wanted = "not built: TORCH_CUDA_ARCH_LIST must be like \"8.0;9.0+PTX\", got 'Hopper'"
    assert report_in(tmp_path / "lib") == {"cpp": "built", "cuda": wanted}


def test_both_backends_are_built_and_what_was_done_is_said(
    script: ModuleType, compiler: Path, nvcc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(script, tmp_path / "lib")
    assert report_in(tmp_path / "lib") == {"cpp": "built", "cuda": "built"}
    assert (tmp_path / "lib/caps_kernels/_cuda.abi3.so").exists()
    assert f"2 of 2 objects compiled for sm_80, sm_90, compute_90 with {nvcc}/bin/nvcc" in capsys.readouterr().out
    assert compiled(compiler).count("link") == 2
    build(script, tmp_path / "lib")
    assert "cuda: 0 of 2 objects compiled" in capsys.readouterr().out
    assert compiled(compiler) == ["link", "link"]


@pytest.mark.parametrize(("choice", "left_out"), [("cpu", "cuda"), ("cuda", "cpp")])
def test_one_backend_alone_is_built(
    script: ModuleType, nvcc: Path, choice: str, left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPS_BUILD", choice)
    build(script, tmp_path / "lib")
    report = report_in(tmp_path / "lib")
    assert report.pop(left_out) == f"not built: CAPS_BUILD={choice} when the package was installed"
    assert list(report.values()) == ["built"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    ignored = shutil.ignore_patterns("__pycache__", "_build.json", "*.so")
    shutil.copytree(ROOT / "caps_kernels", root / "caps_kernels", ignore=ignored)
    (root / "README.md").write_text("caps_kernels\n", encoding="utf-8")
    (root / "logos").mkdir()
    (root / "logos" / "__init__.py").write_text("", encoding="utf-8")
    return root


def run_hook(checkout: Path, hook: str, choice: str) -> subprocess.CompletedProcess[str]:
    """Call a hook of the build backend as pip does, from the checkout."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    environment = {**os.environ, "CAPS_BUILD": choice}
    (checkout / "dist").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_wheel_holds_the_package_and_its_report(checkout: Path) -> None:
    done = run_hook(checkout, "build_wheel", "none")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(checkout / "dist" / done.stdout.split()[-1]) as wheel:
        files = set(wheel.namelist())
        report = json.loads(wheel.read("caps_kernels/_build.json"))
    assert all("CAPS_BUILD=none" in reason for reason in report.values())
    assert {"caps_kernels/py.typed", "caps_kernels/ops/squash/reference.py"} <= files
    assert {name.split("/")[0].split("-")[0] for name in files} == {"caps_kernels"}
    assert report_in(checkout) is None


def test_an_editable_build_writes_its_report_into_the_checkout(checkout: Path) -> None:
    done = run_hook(checkout, "build_editable", "none")
    assert done.returncode == 0, done.stderr
    report = report_in(checkout)
    (checkout / "caps_kernels" / "_build.json").unlink()
    assert set(report) == {"cpp", "cuda"}


def test_a_build_that_cannot_be_done_fails_with_the_reason(checkout: Path) -> None:
    done = run_hook(checkout, "build_wheel", "cpu")
    assert done.returncode != 0
    assert "CAPS_BUILD=cpu, but this version has no C++ kernels" in done.stderr


def write_report(path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> dict[str, str]:
    monkeypatch.setattr(_extension, "BUILD_REPORT", path / "_build.json")
    if content is not None:
        (path / "_build.json").write_bytes(content)
    return _extension._build_report()


def test_the_package_gives_the_reports_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = write_report(tmp_path, monkeypatch, json.dumps({"cpp": "no compiler", "cuda": "no nvcc"}).encode())
    assert _extension._load("cpp", report) == "no compiler"
    assert _extension._load("cuda", report) == "no nvcc"


@pytest.mark.parametrize("content", [None, b"{}"], ids=["no file", "no entry"])
def test_without_a_report_the_reason_says_what_to_do(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = write_report(tmp_path, monkeypatch, content)
    assert _extension._load("cpp", report) == "setup.py has not built it; run `pip install -e .`"


@pytest.mark.parametrize("content", [b"", b'{"cpp": ', b"\xff\xfe", b"[1]", b'"built"', b"null"], ids=repr)
def test_a_corrupt_report_is_the_reason(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = write_report(tmp_path, monkeypatch, content)
    for backend in ("cpp", "cuda"):
        reason = _extension._load(backend, report)
        assert reason is not None
        assert reason.startswith("_build.json cannot be read: ")


def test_a_library_that_does_not_load_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "caps_kernels._cpp", None)
    reason = _extension._load("cpp", {"cpp": "built"})
    assert reason is not None
    assert reason.startswith("its library was built but does not load: ")
    monkeypatch.setitem(sys.modules, "caps_kernels._cpp", ModuleType("caps_kernels._cpp"))
    assert _extension._load("cpp", {"cpp": "built"}) is None


def test_a_torch_without_cuda_does_not_load_the_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _extension._load("cuda", {"cuda": "built"}) == "this torch has no CUDA"

"""The self-check on a real device, and the programs that run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from caps_kernels import CapsuleLayer, FallbackWarning, _trust, backends

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("cuda")


@pytest.fixture(autouse=True)
def _nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_trust, "_TRIALS", {})
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def test_the_selfcheck_passes_here(backend: str) -> None:
    trial = _trust.trial(backend, "cuda", torch.cuda.current_device())
    assert trial.reason is None, trial
    assert set(trial.ops) == set(backends.ops())
    assert all(text.startswith("ok") for text in trial.ops.values())


def test_a_layer_takes_a_gpu_backend_unasked_and_learns() -> None:
    layer = CapsuleLayer(36, 8, 10, 16, device="cuda")
    u = torch.randn(4, 36, 8, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        layer(u).square().sum().backward()
    chosen = [v.backend for v in backends.explain("dense_capsules", u, layer.weight) if v.chosen]
    assert chosen == [backends.available()[0]]
    assert chosen[0] in ("cuda", "triton")
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_a_layer_that_no_cuda_tile_holds_goes_to_triton() -> None:
    u, weight = torch.randn(2, 8, 4, device="cuda"), torch.randn(8, 65, 4, 4, device="cuda")
    chosen = [v.backend for v in backends.explain("dense_capsules", u, weight) if v.chosen]
    assert chosen == [next(name for name in ("triton", "cuda") if name in backends.available())]


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_checks_every_gpu_backend() -> None:
    run("-m", "caps_kernels", "--check")


def test_the_benchmark_measures_the_gpu(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    out = run("bench/run.py", "--quick", "--json", str(file))
    assert "CUDA events" in out
    content = json.loads(file.read_text(encoding="utf-8"))
    ours = backends.available()[0]
    times = {case: {each["name"]: each for each in found["contenders"]} for case, found in content["cases"].items()}
    assert times
    for case, contenders in times.items():
        assert contenders[ours]["times"]["both"]["median"] > 0, (case, contenders[ours]["failed"])
    assert isinstance(content["peak_bytes"]["main"][ours]["both"], int)


def test_whole_training_steps_are_measured_on_the_gpu() -> None:
    out = run("bench/end_to_end.py", "--rounds", "2", "--model", "logo_capsnet")
    assert f"| {backends.available()[0]} |" in out

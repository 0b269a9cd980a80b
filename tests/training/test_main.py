"""train.py as a user starts it: the real networks on a small folder in the 2017 format."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.logos import rs_folder
from tests.training.compare import assert_same_runs

ROOT = Path(__file__).parents[2]


def start(cwd: Path, *flags: str) -> subprocess.Popen[str]:
    # A process group of its own, as a terminal gives it, so that Ctrl-C can reach the workers too.
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=cwd,
        # Threads of processes that share the cores spend their time waiting for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frames")
    rs_folder.write(root / "rs", classes=2, frames=6, seed=0)
    return root


def stop_after(process: subprocess.Popen[str], epoch: str, number: int) -> str:
    """Send a signal to every process of the run once the epoch's line is there; its output."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(epoch):
            break
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    return out


def test_the_network_of_2017_trains(folder: Path) -> None:
    data = ["--data", f"rs:{folder / 'rs'}", "--model", "politically_correct"]
    run = start(folder, *data, "--epochs", "1", "--limit-batches", "1", "--out", "2017")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "Weights of best.pt (epoch 1)" in out
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / "2017" / name) as image:
            assert len(image.convert("RGB").getcolors(10**6) or []) > 50


def test_goes_on_after_signals_to_all_processes_of_a_run(folder: Path) -> None:
    data = ["--data", f"rs:{folder / 'rs'}", "--size", "32x16", "--batch-size", "1"]
    data += ["--epochs", "3", "--limit-batches", "30", "--workers", "2"]
    whole, stopped = start(folder, *data, "--out", "whole"), start(folder, *data, "--out", "run")
    assert "--resume run" in stop_after(stopped, "1/3", signal.SIGINT)
    again = start(folder, "--resume", "run", "--workers", "1")
    assert "--resume run" in stop_after(again, "2/3", signal.SIGTERM)
    last = start(folder, "--resume", "run", "--workers", "0")
    for run in (whole, last):
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    assert_same_runs(folder / "whole", folder / "run")

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAIT = """
import time
from training.interrupts import Interrupts
with Interrupts() as interrupts:
    print("ready", flush=True)
    while not interrupts.signal:
        time.sleep(0.01)
    print("asked to stop", flush=True)
    time.sleep(2)
    print("came to the end", flush=True)
"""


@pytest.fixture
def process() -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def test_the_second_ctrl_c_quits_at_once(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked to stop\n"
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert out == ""
    assert "Ctrl-C again quits at once" in err
    assert "Traceback" not in err


def test_a_signal_passed_on_twice_is_one(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == "asked to stop\ncame to the end\n"

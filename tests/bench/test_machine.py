"""bench/machine.py: the warm heap."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import machine

FREED = """
import torch
from bench import machine

kept = torch.ones(1)
large = [torch.ones(2**22) for _ in range(16)]
kept_at_the_top = torch.ones(2**10)
del large
before = machine.resident()
machine.give_memory_back()
print(before - machine.resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc keeps a heap that can be trimmed")
def test_a_warm_heap_gives_its_free_memory_back() -> None:
    environment = machine.environment(warm=True)
    command = [sys.executable, "-c", FREED]
    done = subprocess.run(command, env=environment, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 * 2**20

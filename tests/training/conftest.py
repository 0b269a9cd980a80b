from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


class Server:
    """Runs train.py on the tiny data in processes of its own; see tiny.py."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.training.tiny"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, cwd: Path, *argv: str, **request: Any) -> Result:
        assert self.process.stdin is not None
        request |= {"argv": argv, "cwd": str(cwd)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = int(self._line())
        texts = [(cwd / name).read_text() for name in ("stdout", "stderr")]
        return Result(status, *texts)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """On cores that others use too, threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs that nothing ever stopped; read it only."""
    folder = tmp_path_factory.mktemp("whole")
    result = server.run(folder, "--out", "run")
    assert result.status == 0, result.err
    return folder / "run"

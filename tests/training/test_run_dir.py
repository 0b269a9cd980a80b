from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import run_dir
from training.errors import TrainingError
from training.run_dir import RunDir

HOLD = """
import sys
from pathlib import Path
from training.run_dir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    run_dir.write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        run_dir.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another process"), RunDir(tmp_path).lock():
            pass
        other.kill()
    with RunDir(tmp_path).lock():
        pass


def test_epoch_files_come_by_number(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    for name in ("epoch_0010.pt", "epoch_0009.pt", "epoch_10000.pt", ".epoch_0011.pt.tmp", "x.pt"):
        (run.checkpoints / name).touch()
    assert list(run.epoch_files()) == [9, 10, 10000]
    assert run.epoch_file(9) == run.epoch_files()[9]
    run.remove_leftovers()
    assert not (run.checkpoints / ".epoch_0011.pt.tmp").exists()


def test_a_new_run_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    run_dir.check_free(tmp_path)
    run_dir.check_free(tmp_path / "new" / "deeper")
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="is a file"):
        run_dir.check_free(tmp_path / "file")
    with pytest.raises(TrainingError, match="nothing is overwritten"):
        run_dir.check_free(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(TrainingError, match="--resume"):
        run_dir.check_free(tmp_path)


def test_default_folders_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20300102-030405")
    first = run_dir.default_folder("net", "rs:/some/where")
    assert first == Path("runs/net-rs-20300102-030405")
    first.mkdir(parents=True)
    assert run_dir.default_folder("net", "rs:/some/where") == Path("runs/net-rs-20300102-030405-2")

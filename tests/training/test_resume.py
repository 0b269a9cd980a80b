"""Runs that are killed, interrupted, extended or moved come out like runs that never were."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.training.compare import assert_same_runs, assert_same_state, metrics
from tests.training.conftest import Server
from training import checkpoint

# A whole run has 1 + 18 training steps (the first is the rehearsal's), 9 + 5 evaluated batches, and
# replaces 12 to 14 files.
EVENTS = ("train", "eval", "before replace", "after replace")


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_at_random_points(server: Server, whole: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    arguments = ["--out", "run"]
    for _ in range(4):
        request = {"event": chance.choice(EVENTS), "nth": chance.randint(2, 9)}
        result = server.run(tmp_path, *arguments, signal=signal.SIGKILL, **request)
        assert result.status in (0, -signal.SIGKILL), result.err
        arguments = ["--resume", "run"]
    assert server.run(tmp_path, *arguments).status == 0
    assert_same_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("nth", range(1, 11))
def test_killed_around_every_file_of_the_first_epochs(server: Server, whole: Path, tmp_path: Path, nth: int) -> None:
    for event in ("before replace", "after replace"):
        folder = tmp_path / event.replace(" ", "_")
        folder.mkdir()
        killed = server.run(folder, "--out", "run", event=event, nth=nth, signal=signal.SIGKILL)
        assert killed.status == -signal.SIGKILL
        if (folder / "run/config.json").exists():
            resumed = server.run(folder, "--resume", "run")
            assert resumed.status == 0, resumed.err
            assert_same_runs(whole, folder / "run")
        else:
            refused = server.run(folder, "--resume", "run")
            assert (refused.status, nth) == (2, 1)
            assert "start a new run" in refused.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("event", "nth", "epoch", "batch"),
    [("train", 2, 0, 1), ("train", 10, 1, 3), ("train", 13, 1, 6), ("eval", 5, 1, 6)],
)
def test_interrupted_in_mid_epoch(
    server: Server,
    whole: Path,
    tmp_path: Path,
    number: int,
    event: str,
    nth: int,
    epoch: int,
    batch: int,
) -> None:
    stopped = server.run(tmp_path, "--out", "run", event=event, nth=nth, signal=number)
    assert stopped.status == 128 + number
    assert "python train.py --resume run\n" in stopped.out
    saved = checkpoint.load(tmp_path / "run/interrupted.pt")
    assert (saved.epoch, saved.batch) == (epoch, batch)
    assert server.run(tmp_path, "--resume", "run").status == 0
    assert_same_runs(whole, tmp_path / "run")


def test_interrupted_twice_in_one_epoch_and_killed_after(server: Server, whole: Path, tmp_path: Path) -> None:
    server.run(tmp_path, "--out", "run", event="train", nth=9, signal=signal.SIGINT)
    again = server.run(tmp_path, "--resume", "run/interrupted.pt", event="train", nth=3, signal=signal.SIGINT)
    assert again.status == 130
    saved = checkpoint.load(tmp_path / "run/interrupted.pt")
    assert (saved.epoch, saved.batch) == (1, 4)
    killed = server.run(tmp_path, "--resume", "run", event="train", nth=3, signal=signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    assert server.run(tmp_path, "--resume", "run").status == 0
    assert_same_runs(whole, tmp_path / "run")


def test_interrupt_while_an_epoch_is_saved_stops_behind_it(server: Server, whole: Path, tmp_path: Path) -> None:
    stopped = server.run(tmp_path, "--out", "run", event="before replace", nth=2, signal=signal.SIGINT)
    assert stopped.status == 130
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["epoch_0001.pt"]
    assert not (tmp_path / "run/interrupted.pt").exists()
    assert server.run(tmp_path, "--resume", "run").status == 0
    assert_same_runs(whole, tmp_path / "run")


def test_interrupt_before_training_leaves_nothing(server: Server, tmp_path: Path) -> None:
    stopped = server.run(tmp_path, "--out", "run", event="load", nth=1, signal=signal.SIGINT)
    assert stopped.status == 130
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "run").exists()


def test_neither_workers_nor_the_folder_change_the_result(server: Server, whole: Path, tmp_path: Path) -> None:
    stopped = server.run(tmp_path, "--out", "run", "--workers", "2", event="train", nth=10, signal=signal.SIGINT)
    assert stopped.status == 130
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert server.run(tmp_path, "--resume", "moved", "--workers", "1").status == 0
    assert_same_runs(whole, tmp_path / "moved")


def test_a_finished_run_prints_its_table_again(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    result = server.run(tmp_path, "--resume", "run")
    assert result.status == 0
    assert "Weights of best.pt" in result.out
    assert "epoch    loss" not in result.out
    assert_same_runs(whole, tmp_path / "run")


def test_more_epochs_say_what_happens_to_the_learning_rate(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    killed = server.run(tmp_path, "--resume", "run", "--epochs", "5", event="train", nth=4, signal=signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    assert "learning rate is that of a run of 5" in killed.out
    resumed = server.run(tmp_path, "--resume", "run")
    assert resumed.status == 0
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == list("12345")
    assert "5/5" in resumed.out


def test_from_an_earlier_checkpoint_later_ones_are_set_aside(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    stopped = server.run(
        tmp_path,
        *("--resume", "run/checkpoints/epoch_0001.pt"),
        event="train",
        nth=3,
        signal=signal.SIGINT,
    )
    assert stopped.status == 130
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == ["1"]
    assert_same_state(whole / "checkpoints/epoch_0001.pt", tmp_path / "run/best.pt")
    aside = tmp_path / "run/checkpoints/superseded"
    assert sorted(file.name for file in aside.iterdir()) == ["epoch_0002.pt", "epoch_0003.pt"]
    assert server.run(tmp_path, "--resume", "run").status == 0
    shutil.rmtree(aside)
    assert_same_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("lone", [True, False])
def test_going_on_in_a_new_folder_leaves_the_old_one_alone(
    server: Server, whole: Path, tmp_path: Path, lone: bool
) -> None:
    source = tmp_path / "alone.pt"
    shutil.copy(whole / "checkpoints/epoch_0001.pt", source)
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    start = source if lone else whole / "checkpoints/epoch_0001.pt"
    assert server.run(tmp_path, "--resume", str(start), "--out", "new").status == 0
    assert_same_runs(whole, tmp_path / "new")
    after = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    assert before == after


def test_without_out_a_lone_checkpoint_gets_a_run_of_its_own(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "checkpoints/epoch_0003.pt", tmp_path / "alone.pt")
    assert server.run(tmp_path, "--resume", "alone.pt").status == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-icons-2")
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lr", "3"], "--lr 3.0 (the run has 0.01)"),
        (["--batch-size", "9", "--seed", "1"], "--batch-size 9 (the run has 8), --seed 1"),
        (["--size", "20x10"], "--size 20x10 (the run has 8x8)"),
        (["--epochs", "2"], "--epochs 2 (the run has 3)"),
        (["--amp"], "--amp True (the run has False)"),
        (["--data", "rs:elsewhere"], "elsewhere (the run has icons)"),
        (["--limit-batches", "1"], "--limit-batches 1 (the run has unset)"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(
    server: Server, whole: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    result = server.run(tmp_path, "--resume", str(whole), *flags)
    assert result.status == 2
    assert named in result.err
    assert "Traceback" not in result.err


def test_flags_that_repeat_the_run_or_do_not_matter_are_taken(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    flags = ["--lr", "0.01", "--batch-size", "8", "--device", "cpu", "--workers", "0"]
    assert server.run(tmp_path, "--resume", "run", *flags).status == 0


def test_other_data_is_refused(server: Server, tmp_path: Path) -> None:
    # The tiny data depend on the seed; a changed seed in config and checkpoint is changed data.
    assert server.run(tmp_path, "--out", "run", "--epochs", "1").status == 0
    file = tmp_path / "run/checkpoints/epoch_0001.pt"
    saved = checkpoint.load(file)
    fingerprint = saved.data_fingerprint[::-1]
    checkpoint.save(type(saved)(**{**vars(saved), "data_fingerprint": fingerprint}), file)
    result = server.run(tmp_path, "--resume", "run")
    assert result.status == 2
    assert "is not what the run was trained on" in result.err


def test_best_is_found_again_when_its_file_is_gone(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/best.pt").write_bytes(b"")
    assert server.run(tmp_path, "--resume", "run").status == 0
    assert_same_state(whole / "best.pt", tmp_path / "run/best.pt")

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.conftest import Server
from training import checkpoint, loop
from training.errors import NonFiniteLossError
from training.interrupts import Interrupts
from training.learner import Learner
from training.run_dir import RunDir
from training.settings import Settings


def test_a_run_leaves_everything_and_says_how_it_went(server: Server, tmp_path: Path) -> None:
    result = server.run(tmp_path, "--out", "run")
    assert result.status == 0
    assert result.err == ""
    left = {str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*.*")}
    epochs = {f"checkpoints/epoch_000{n}.pt" for n in (1, 2, 3)}
    pictures = {"curves.png", "confusion.png"}
    assert left == {"config.json", "metrics.csv", "best.pt", ".lock"} | pictures | epochs
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines if line[1:3] == "/3"] == ["1/3", "2/3", "3/3"]
    assert "validation (24 images)" in result.out
    assert "other artist (12 images)" in result.out


def test_best_is_of_the_best_epoch_and_the_first_of_equals(whole: Path) -> None:
    with (whole / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: (float(row["validation_top1"]), float(row["validation_f1"])))
    assert checkpoint.load(whole / "best.pt").epoch == int(best["epoch"])


def test_the_table_is_of_best_not_of_last(server: Server, whole: Path, tmp_path: Path) -> None:
    result = server.run(tmp_path, "--out", "run", "--lr", "0.3", "--epochs", "6")
    best = checkpoint.load(tmp_path / "run/best.pt")
    assert f"Weights of best.pt (epoch {best.epoch})" in result.out
    row = best.history[best.epoch - 1]
    line = next(line for line in result.out.splitlines() if line.startswith("validation"))
    assert f"{100 * row['validation_top1']:.1f} %" in line
    assert f"{row['validation_f1']:.3f}" in line


def test_limit_batches_bounds_every_pass(server: Server, tmp_path: Path) -> None:
    result = server.run(tmp_path, "--out", "run", "--limit-batches", "2", "--epochs", "2")
    assert result.status == 0
    saved = checkpoint.load(tmp_path / "run/checkpoints/epoch_0002.pt")
    assert [row["train_images"] for row in saved.history] == [16, 16]
    assert "validation (16 images)" in result.out
    assert "other artist (12 images)" in result.out
    # The schedule knows how short the epochs are: the last of four steps is near the end.
    assert saved.history[-1]["learning_rate"] < saved.settings.lr / 3
    assert saved.optimizer["param_groups"][0]["lr"] == saved.history[-1]["learning_rate"]


def test_amp_keeps_float32_weights_and_changes_the_numbers(server: Server, whole: Path, tmp_path: Path) -> None:
    assert server.run(tmp_path, "--out", "run", "--amp").status == 0
    ours = checkpoint.load(tmp_path / "run/best.pt").model
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    theirs = checkpoint.load(whole / "best.pt").model
    assert not torch.equal(ours["linear.weight"], theirs["linear.weight"])


def test_a_loss_that_is_not_finite_stops_the_run(server: Server, tmp_path: Path) -> None:
    # The first training step is the rehearsal's, so this is step 9: epoch 2, batch 3.
    result = server.run(tmp_path, "--out", "run", nan=10)
    assert result.status == 1
    assert "the loss became nan in epoch 2, batch 3 of 6" in result.err
    assert "run/checkpoints/epoch_0001.pt is kept" in result.err
    assert "--lr" in result.err
    assert checkpoint.load(tmp_path / "run/checkpoints/epoch_0001.pt").epoch == 1
    assert not (tmp_path / "run/interrupted.pt").exists()


@pytest.mark.parametrize("together", [1, 4, 100])
def test_the_batch_is_named_exactly_when_losses_are_read_in_groups(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "EVENTS", {})
    monkeypatch.setattr(tiny, "_WANTED", {"nan": 3})
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", {"cpu": together})
    learner = Learner(tiny.TINY, tiny.Network(3, (8, 8)), device=torch.device("cpu"), amp=False)
    trainer = loop.Trainer(settings(), learner, tiny.data("icons", seed=0), RunDir(tmp_path))
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 3 of 6"):
        trainer.fit(Interrupts())


def settings() -> Settings:
    return Settings(
        data="icons",
        model="tiny",
        image_size=(8, 8),
        classes=3,
        images_per_class=None,
        epochs=3,
        batch_size=8,
        lr=0.01,
        weight_decay=0.0,
        iterations=3,
        routing_grad="full",
        backend=None,
        amp=False,
        channels_last=False,
        workers=0,
        seed=0,
        device="cpu",
        limit_batches=None,
        presence_threshold=0.5,
    )

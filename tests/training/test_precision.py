"""bfloat16 and the memory layout of images: what they change, and that a run in them goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from logos.splits import LogoData
from tests.training import tiny
from tests.training.compare import assert_same_state
from training import checkpoint, learner, plots
from training.interrupts import Interrupts
from training.loop import Trainer
from training.run_dir import RunDir
from training.settings import Settings

CPU = torch.device("cpu")


def settings(*, amp: bool = True, channels_last: bool = True) -> Settings:
    given = {"model": "logo_capsnet", "image_size": (16, 16), "classes": 3, "epochs": 2, "batch_size": 4, "workers": 0}
    return replace(train.resolve(given), amp=amp, channels_last=channels_last)


def data() -> LogoData:
    splits = [tiny.TinySplit(seed, 8) for seed in (1, 2)]
    for split in splits:
        split.images = np.tile(split.images, (1, 1, 2, 2))
    return LogoData(tiny.CLASSES, splits[0], splits[1], {})


def trainer(folder: Path, chosen: Settings) -> Trainer:
    checkpoint.seed_everything(0)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return Trainer(chosen, learner.build(chosen, 3, CPU), data(), RunDir(folder))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_curves", "draw_confusion"):
        monkeypatch.setattr(plots, name, tiny.write_picture)


def test_going_on_in_bfloat16_and_channels_last_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = (trainer(tmp_path / name, settings()) for name in ("whole", "resumed"))
    with Interrupts() as interrupts:
        whole.fit(interrupts)
        resumed.restore(checkpoint.load(tmp_path / "whole/checkpoints/epoch_0001.pt"))
        resumed.fit(interrupts)
    assert_same_state(*(tmp_path / name / "checkpoints/epoch_0002.pt" for name in ("whole", "resumed")))


def test_layout_changes_memory_and_rounding_alone() -> None:
    images = torch.from_numpy(data().train.images)  # type: ignore[attr-defined]
    targets = torch.from_numpy(data().train.targets).float()
    found = []
    for channels_last in (False, True):
        checkpoint.seed_everything(0)
        ready = learner.build(settings(amp=False, channels_last=channels_last), 3, CPU)
        layouts: list[bool] = []

        def note(_: nn.Module, inputs: tuple[torch.Tensor], layouts: list[bool] = layouts) -> None:
            layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

        convolutions = [module for module in ready.network.modules() if isinstance(module, nn.Conv2d)]
        for convolution in convolutions:
            convolution.register_forward_pre_hook(note)
        loss, scores = ready.forward(images, targets)
        torch.autograd.backward(loss)
        assert layouts[0] == channels_last
        found.append([loss.detach(), scores, *(p.grad for p in ready.network.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("has", "amp"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bfloat16_is_the_default_where_the_processor_has_it(
    has: str, amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("avx2", "avx512_bf16", "amx_bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: name == has for name in names})
    assert train.resolve({"device": "cpu"}).amp == amp
    assert not train.resolve({"device": "cpu", "amp": False}).amp
    assert train.resolve({"device": "cpu", "amp": True}).amp


def test_a_model_says_which_layout_suits_it() -> None:
    assert train.resolve({}).channels_last
    assert not train.resolve({"model": "politically_correct"}).channels_last
    assert not train.resolve({"channels_last": False}).channels_last


def test_runs_from_before_the_layout_could_be_chosen_go_on() -> None:
    stored = settings().to_dict()
    del stored["channels_last"]
    assert not Settings.from_dict(stored).channels_last

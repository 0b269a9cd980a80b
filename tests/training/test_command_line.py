"""What is refused is refused before any work, with a message that names the flag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import logos
import train
from tests.training.conftest import Server
from training import checkpoint

REFUSED = [
    (["--epochs", "0"], "--epochs must be at least 1, not 0"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--batch-size", "-3"], "--batch-size must be at least 1, not -3"),
    (["--lr", "0"], "--lr must be positive"),
    (["--lr", "nan"], "--lr must be positive"),
    (["--iterations", "0"], "--iterations must be at least 1"),
    (["--classes", "1"], "--classes must be at least 2"),
    (["--images-per-class", "0"], "--images-per-class must be at least 1"),
    (["--limit-batches", "0"], "--limit-batches must be at least 1"),
    (["--workers", "-1"], "--workers must be at least 0"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--seed", str(2**63)], "--seed must be below 2**63"),
    (["--size", "big"], "argument --size: 'big' is neither"),
    (["--size", "64x"], "argument --size: '64x' is neither"),
    (["--size", "0"], "--size must be positive"),
    (["--size", "7"], "--model logo_capsnet cannot be trained on images of 7x7"),
    (["--data", "photos"], "argument --data: 'photos' is neither icons nor rs:FOLDER"),
    (["--data", "rs:"], "argument --data: 'rs:' is neither"),
    (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
    (["--routing-grad", "half"], "argument --routing-grad: invalid choice"),
    (["--backend", "magic"], "argument --backend: invalid choice"),
    (["--backend", "cuda", "--device", "cpu"], "backend 'cuda' cannot run"),
    (["--device", "toaster"], "--device must be auto, cpu, cuda or cuda:N"),
    (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N"),
    (["--device", "cuda:99"], "--device cuda:99: torch"),
    (["--out", "pyproject.toml"], "--out pyproject.toml is a file"),
    (["--out", "tests"], "--out tests holds files already"),
    (["--resume", "nowhere"], "--resume nowhere: there is no such file or folder"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_refused_before_any_work(
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(logos, "load", lambda *_, **__: pytest.fail("data was loaded"))
    try:
        status = train.main(flags)
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_help_names_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    flags = "data model size classes images-per-class epochs batch-size lr iterations routing-grad"
    for flag in (flags + " backend amp channels-last workers seed device out resume limit-batches").split():
        assert f"--{flag} " in text or f"--{flag}," in text
    assert text.count("default") >= 15


def test_a_failing_data_load_is_a_message(server: Server, tmp_path: Path) -> None:
    result = server.run(tmp_path, "--data", "rs:missing", "--out", "run")
    assert result.status == 2
    assert result.err == f"train.py: rs:{tmp_path}/missing: no such folder\n"
    assert not (tmp_path / "run").exists()


def test_config_holds_everything(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["classes"] == ["round", "square", "star"]
    assert config["settings"] == checkpoint.load(whole / "best.pt").settings.to_dict()
    assert config["settings"]["epochs"] == 3
    assert {"torch", "caps_kernels", "numpy", "python", "threads"} <= set(config["versions"])


def test_size_is_width_by_height(server: Server, tmp_path: Path) -> None:
    result = server.run(tmp_path, "--size", "9x7", "--out", "run")
    assert result.status == 2
    assert "images of 9x7: images must be 8 pixels high" in result.err

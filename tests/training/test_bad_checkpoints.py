"""Damaged, foreign and hostile files: a clear message, the previous one named, nothing executed."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Server
from training import checkpoint


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.witness),))


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def truncated(good: bytes, _: Path) -> bytes:
    return good[: len(good) * 2 // 3]


def empty(good: bytes, _: Path) -> bytes:
    return b""


def zeros(good: bytes, _: Path) -> bytes:
    return bytes(len(good))


def one_bit_flipped(good: bytes, _: Path) -> bytes:
    # In the middle of the largest record, where torch itself notices nothing.
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    middle = largest.header_offset + 200 + largest.file_size // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


def a_picture(good: bytes, _: Path) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes(100)


def weights_alone(good: bytes, _: Path) -> bytes:
    return _saved({"linear.weight": torch.zeros(3)})


def a_newer_version(good: bytes, _: Path) -> bytes:
    return _saved({"format": checkpoint.FORMAT, "version": 99})


def a_bomb(good: bytes, witness: Path) -> bytes:
    return pickle.dumps(Bomb(witness))


def a_bomb_among_weights(good: bytes, witness: Path) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    return _saved({**content, "rng": Bomb(witness)})


def a_zip_bomb(good: bytes, _: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    return buffer.getvalue()


def other_weights(good: bytes, _: Path) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    return _saved({**content, "model": {"linear.weight": torch.zeros(3)}})


def other_moments(good: bytes, _: Path) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    return _saved(content)


def odd_random_state(good: bytes, _: Path) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    content["rng"]["python"] = (3, (1, 2), None)
    return _saved(content)


def odd_history(good: bytes, _: Path) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    return _saved({**content, "history": [{"epoch": 1}]})


def odd_settings(good: bytes, _: Path) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    content["settings"]["epochs"] = "many"
    return _saved(content)


DAMAGES = [
    truncated,
    empty,
    zeros,
    one_bit_flipped,
    a_picture,
    weights_alone,
    a_newer_version,
    a_bomb,
    a_bomb_among_weights,
    a_zip_bomb,
    other_weights,
    other_moments,
    odd_random_state,
    odd_history,
    odd_settings,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_told_and_the_previous_checkpoint_named(
    server: Server, whole: Path, tmp_path: Path, damage: Callable[[bytes, Path], bytes]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/epoch_0003.pt"
    witness = tmp_path / "witness"
    newest.write_bytes(damage(newest.read_bytes(), witness))
    for argument in ("run", "run/checkpoints/epoch_0003.pt"):
        result = server.run(tmp_path, "--resume", argument)
        assert result.status == 2, result.out
        assert "run/checkpoints/epoch_0003.pt" in result.err
        assert "try --resume run/checkpoints/epoch_0002.pt" in result.err
        assert "Traceback" not in result.err
    assert not witness.exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


def test_a_damaged_one_is_not_named_as_the_previous(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for number in (2, 3):
        (tmp_path / f"run/checkpoints/epoch_000{number}.pt").write_bytes(b"PK")
    result = server.run(tmp_path, "--resume", "run")
    assert "try --resume run/checkpoints/epoch_0001.pt" in result.err
    assert server.run(tmp_path, "--resume", "run/checkpoints/epoch_0001.pt").status == 0


def test_when_none_is_left_that_is_said(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.write_bytes(b"PK")
    result = server.run(tmp_path, "--resume", "run")
    assert result.status == 2
    assert "No intact checkpoint" in result.err


def test_damaged_interrupted_and_best_name_the_newest_epoch(server: Server, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for name in ("interrupted.pt", "best.pt"):
        (tmp_path / "run" / name).write_bytes(b"")
        result = server.run(tmp_path, "--resume", f"run/{name}")
        assert result.status == 2
        assert "try --resume run/checkpoints/epoch_0003.pt" in result.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("plain", "holds no run"),
        ("note.txt", "not a checkpoint"),
    ],
)
def test_what_is_no_run_at_all(server: Server, tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "note.txt").write_text("remember the milk")
    result = server.run(tmp_path, "--resume", argument)
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}', '{"settings": 3}', "[" * 99999])
def test_a_damaged_config(server: Server, whole: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/config.json").write_text(content)
    result = server.run(tmp_path, "--resume", "run")
    assert result.status == 2
    assert "run/config.json cannot be used" in result.err
    assert "Remove it" in result.err
    (tmp_path / "run/config.json").unlink()
    assert server.run(tmp_path, "--resume", "run").status == 0


def test_saving_is_all_or_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint.load(whole / "best.pt")
    path = tmp_path / "state.pt"
    checkpoint.save(saved, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(replace(saved, epoch=7), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.pt"]

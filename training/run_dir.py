"""The folder a run leaves behind: creating, finding, locking it and writing its files safely."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import TrainingError
from training.settings import Settings

RUNS = Path("runs")
_EPOCH_FILE = re.compile(r"epoch_(\d{4,})\.pt")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` so that a reader, or a crash at any moment, meets the old or the new file whole.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunDir:
    """The paths inside one run's folder, and what is written there."""

    path: Path

    @property
    def config(self) -> Path:
        """Settings, classes and versions, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One row an epoch."""
        return self.path / "metrics.csv"

    @property
    def best(self) -> Path:
        """The checkpoint of the epoch with the best validation."""
        return self.path / "best.pt"

    @property
    def interrupted(self) -> Path:
        """The checkpoint of a run stopped by a signal in mid-epoch."""
        return self.path / "interrupted.pt"

    @property
    def curves(self) -> Path:
        """Loss, accuracy and F1 over the epochs."""
        return self.path / "curves.png"

    @property
    def confusion(self) -> Path:
        """Which logo is taken for which."""
        return self.path / "confusion.png"

    @property
    def checkpoints(self) -> Path:
        """One checkpoint an epoch."""
        return self.path / "checkpoints"

    def epoch_file(self, epoch: int) -> Path:
        """The checkpoint written after `epoch` (counted from 1)."""
        return self.checkpoints / f"epoch_{epoch:04d}.pt"

    def epoch_files(self) -> dict[int, Path]:
        """The epochs' checkpoints by epoch, ascending; nothing is read."""
        found = {}
        if self.checkpoints.is_dir():
            for file in self.checkpoints.iterdir():
                if match := _EPOCH_FILE.fullmatch(file.name):
                    found[int(match[1])] = file
        return dict(sorted(found.items()))

    def write_config(self, settings: Settings, classes: Sequence[str], versions: object) -> None:
        """Write config.json."""
        content = {"settings": settings.to_dict(), "classes": list(classes), "versions": versions}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.config, text.encode())

    def read_config(self) -> Settings:
        """The settings in config.json.

        Raises:
            TrainingError: it cannot be read, or holds something else.
        """
        try:
            content = json.loads(self.config.read_bytes())
            if not isinstance(content, dict):
                raise TrainingError("it is not a table of names and values")
            return Settings.from_dict(content.get("settings"))
        except (OSError, ValueError, RecursionError, TrainingError) as error:
            raise TrainingError(f"{self.config} cannot be used: {error}") from error

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.csv whole; floats keep every bit."""
        text = io.StringIO()
        if history:
            writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        write_atomically(self.metrics, text.getvalue().encode())

    def set_aside_after(self, epoch: int) -> list[Path]:
        """Move the checkpoints of later epochs to checkpoints/superseded/; returns what was moved.

        Going on from `epoch` makes a new history; a later checkpoint of the old one must not be
        taken for its continuation.
        """
        later = [file for number, file in self.epoch_files().items() if number > epoch]
        folder = self.checkpoints / "superseded"
        # From the newest down: whatever moment a crash chooses, no gap is left in the epochs.
        for file in reversed(later):
            folder.mkdir(exist_ok=True)
            os.replace(file, folder / file.name)
        return later

    def remove_leftovers(self) -> None:
        """Remove what a killed process had begun to write."""
        for folder in (self.path, self.checkpoints):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder.

        Raises:
            TrainingError: another process is at it.
        """
        # A record lock is neither inherited by data loading processes nor left by a killed one.
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise TrainingError(
                    f"another process is training in {self.path}; wait for it, or stop it first"
                ) from error
            except OSError:
                # Some network file systems know no locks; training there is better than refusing.
                pass
            yield


def is_run(folder: Path) -> bool:
    """Whether `folder` looks like what `train.py` leaves behind."""
    return (folder / "config.json").exists() or (folder / "checkpoints").is_dir()


def check_free(folder: Path) -> None:
    """Refuse `folder` for a new run unless it is new or empty.

    Raises:
        TrainingError: the folder holds something, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"--out {folder} is a file; a run needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        what = "a run already" if is_run(folder) else "files already"
        raise TrainingError(
            f"--out {folder} holds {what} and nothing is overwritten; choose another folder"
            + (f", or continue that run with --resume {folder}" if is_run(folder) else "")
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if not os.access(existing, os.W_OK):
        raise TrainingError(f"{folder} cannot be made: {existing} is not writable")


def create(folder: Path, settings: Settings, classes: Sequence[str], versions: object) -> RunDir:
    """Make the folder of a new run, with its config.json.

    Raises:
        TrainingError: meanwhile another process has taken it.
    """
    run = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run.checkpoints.mkdir()
    except FileExistsError as error:
        raise TrainingError(f"{folder} was taken by another run meanwhile; try again") from error
    run.write_config(settings, classes, versions)
    return run


def default_folder(model: str, data: str) -> Path:
    """A folder for a new run that does not exist yet: runs/MODEL-DATA-DATE-TIME."""
    name = f"{model}-{data.partition(':')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (RUNS / (name + suffix) for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(folder for folder in candidates if not folder.exists())

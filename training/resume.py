"""Finding what `--resume` should go on from, and what to try when that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training import checkpoint, report
from training.checkpoint import Checkpoint, CheckpointError
from training.errors import TrainingError
from training.learner import versions
from training.run_dir import RunDir, is_run, write_atomically
from training.settings import Settings, merge

Rank = tuple[float, float]


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from."""

    settings: Settings
    """Those of the run, with what the command line may change."""
    checkpoint: Checkpoint | None
    """None where the run was stopped before its first checkpoint."""
    file: Path | None
    """Where the checkpoint was read from."""
    run: RunDir | None
    """The run's folder; None for a checkpoint that lies outside of any run."""


def find(path: Path, given: Mapping[str, Any]) -> Resumed:
    """What to go on from, given a run's folder or one of its checkpoints.

    Args:
        path: the argument of `--resume`.
        given: the other flags on the command line, by setting name.

    Raises:
        TrainingError: there is nothing to go on from, the newest checkpoint is damaged (the newest
            intact one is named), or a flag contradicts the run.
    """
    if not path.exists():
        raise TrainingError(f"--resume {path}: there is no such file or folder")
    run = _run_of(path)
    if path.is_dir():
        if run is None:
            raise TrainingError(f"--resume {path}: this folder holds no run of train.py")
        file, saved = _newest(run)
    else:
        file, saved = path, load(path, run)
    if saved is not None:
        stored = saved.settings
        if run is not None and run.config.exists():
            stored = _with_config(stored, run)
    else:
        assert run is not None
        if not run.config.exists():
            raise TrainingError(f"{run.path} was stopped before it began; start a new run")
        stored = run.read_config()
    return Resumed(merge(stored, given), saved, file, run)


def load(path: Path, run: RunDir | None) -> Checkpoint:
    """Read a checkpoint; the error of a damaged one names the newest intact one before it.

    Raises:
        CheckpointError: it cannot be used.
    """
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {advice(path, run)}") from error


def advice(path: Path, run: RunDir | None) -> str:
    """What to try instead of a checkpoint that cannot be used."""
    previous = _previous_intact(path, run) if run is not None else None
    if previous is not None:
        return f"The newest intact one before it: try --resume {previous}"
    return "No intact checkpoint from before it was found; start a new run"


def _run_of(path: Path) -> RunDir | None:
    """The run that `path`, a folder or a file in it, belongs to."""
    start = path if path.is_dir() else path.absolute().parent
    for folder in (start, start.parent if start.name == "checkpoints" else start):
        if is_run(folder):
            # The way the user wrote it is kept for messages where it can be.
            return RunDir(folder if path.is_dir() else _as_written(folder))
    return None


def _as_written(folder: Path) -> Path:
    try:
        return folder.relative_to(Path.cwd())
    except ValueError:
        return folder


def _newest(run: RunDir) -> tuple[Path | None, Checkpoint | None]:
    """The checkpoint that got furthest, read; (None, None) where no epoch was finished."""
    epochs = run.epoch_files()
    newest, file = max(epochs.items(), default=(0, None))
    if run.interrupted.exists():
        saved = load(run.interrupted, run)
        if saved.epoch >= newest:
            return run.interrupted, saved
    if file is None:
        return None, None
    return file, load(file, run)


def _previous_intact(path: Path, run: RunDir) -> Path | None:
    number = next((n for n, file in run.epoch_files().items() if file.name == path.name), None)
    for epoch, file in reversed(run.epoch_files().items()):
        if (number is None or epoch < number) and _is_intact(file):
            return file
    return None


def _is_intact(file: Path) -> bool:
    try:
        checkpoint.load(file)
    except CheckpointError:
        return False
    return True


def _with_config(stored: Settings, run: RunDir) -> Settings:
    """The settings of a checkpoint, with more epochs where the run was extended after it."""
    try:
        config = run.read_config()
    except TrainingError as error:
        raise TrainingError(f"{error}. Remove it to go on with the settings inside the checkpoint") from error
    return replace(stored, epochs=max(stored.epochs, config.epochs))


def prepare_folder(resumed: Resumed, target: RunDir, say: Callable[[str], None]) -> Rank | None:
    """Make the run's folder agree with the checkpoint that is gone on from.

    Later checkpoints are set aside, metrics.csv ends with the checkpoint's epoch, and best.pt is
    the best up to there.

    Args:
        resumed: what is gone on from.
        target: the folder to go on in: the run's own or a new one.
        say: takes one message at a time for the user.

    Returns:
        What the epoch in best.pt was chosen by; None where no epoch is whole.
    """
    saved = resumed.checkpoint
    target.remove_leftovers()
    if saved is None:
        return None
    moved = target.set_aside_after(saved.epoch)
    if moved:
        names = ", ".join(file.name for file in moved)
        say(f"Later checkpoints are now in {target.checkpoints / 'superseded'}: {names}")
    if saved.batch:
        if target.interrupted != resumed.file:
            checkpoint.save(saved, target.interrupted)
    else:
        target.interrupted.unlink(missing_ok=True)
        if saved.epoch and not target.epoch_file(saved.epoch).exists():
            checkpoint.save(saved, target.epoch_file(saved.epoch))
    target.write_metrics(saved.history)
    return _restore_best(resumed, saved, target, say)


def _restore_best(resumed: Resumed, saved: Checkpoint, target: RunDir, say: Callable[[str], None]) -> Rank | None:
    if not saved.history:
        target.best.unlink(missing_ok=True)
        return None
    best = max(saved.history, key=report.row_rank)
    epoch = int(best["epoch"])
    source = resumed.run or target
    for file in (target.best, source.best, source.epoch_file(epoch)):
        try:
            found = checkpoint.load(file)
        except CheckpointError:
            continue
        # As text, because a NaN in a row differs from itself.
        same = repr(found.history) == repr(saved.history[:epoch])
        if found.epoch == epoch and found.batch == 0 and same:
            if file != target.best:
                write_atomically(target.best, file.read_bytes())
            return report.row_rank(best)
    if saved.batch:
        say(f"The checkpoint of epoch {epoch}, the best so far, is gone: the next one replaces it")
        return None
    say(f"The checkpoint of epoch {epoch}, the best so far, is gone: epoch {saved.epoch} replaces it")
    checkpoint.save(saved, target.best)
    return report.row_rank(saved.history[-1])


def changed_versions(saved: Checkpoint) -> list[str]:
    """What differs from when the checkpoint was written, such as "torch 2.13.0 -> 2.14.1"."""
    now = versions()
    return [
        f"{name} {saved.versions.get(name)} -> {now[name]}" for name in now if saved.versions.get(name) != now[name]
    ]

"""Train a capsule network on logos: `python train.py` is enough, `--help` teaches the rest."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import logos
import models
from caps_kernels import BackendError, backends
from logos import generated
from logos.splits import DataError, LogoData
from training import checkpoint, learner, plots, report, resume, run_dir
from training.checkpoint import CheckpointError
from training.errors import TrainingError
from training.interrupts import Interrupts
from training.loop import Trainer, evaluate
from training.resume import Resumed
from training.run_dir import RunDir
from training.settings import ROUTING_GRADS, Settings, shown

DESCRIPTION = """\
Train a capsule network to tell logos on images. Without flags: a colour network on brand marks that
are drawn onto backgrounds here and now, nothing to fetch. What a run leaves behind lies in its
folder, runs/MODEL-DATA-DATE-TIME: config.json, metrics.csv (a row an epoch), curves.png,
confusion.png, checkpoints/ (one an epoch) and best.pt (the best on the validation images)."""

EPILOG = """\
examples:
  python train.py                                     the whole job with its defaults
  python train.py --limit-batches 5 --epochs 2        does everything once, in a minute
  python train.py --data rs:/data/rs --model politically_correct
                                                      the 2017 challenge with the network of 2017
  python train.py --resume runs/NAME                  go on after Ctrl-C, a crash or a power cut
  python train.py --resume runs/NAME --epochs 40      train a finished run for longer

Ctrl-C (or SIGTERM) finishes the step, saves, and prints how to go on; pressed twice it quits at
once. On a CPU a resumed run ends with the same bits as one that was never stopped, if the number
of threads is the same. Exit status: 0 done, 1 stopped by a failure, 2 refused, 130 by Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; a flag that is not given is None, so that --resume can tell."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=_data,
        metavar="SPEC",
        help="icons (default): brand marks drawn by one artist to train and validate, the same "
        "brands by another artist as a test; generated once and cached. rs:FOLDER: television "
        "frames in the format of the 2017 challenge (logos/RS_FORMAT.md)",
    )
    add(
        "--size",
        type=_size,
        dest="image_size",
        metavar="N or WxH",
        help="pixels of the images asked of the data: 64, or width x height as in 180x100; icons "
        "are square (default: what the model was made for)",
    )
    add("--classes", type=int, metavar="N", help=f"brands of icons (default {generated.CLASSES})")
    add(
        "--images-per-class",
        type=int,
        metavar="N",
        help=f"training images a class of icons (default {generated.IMAGES_PER_CLASS}); a tenth as "
        "many validate, a fifth as many test",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that make or decode images; results do not depend on it (default: a core "
        "each to generate icons and to decode frames, none to read icons, which lie in memory)",
    )
    _add_training_flags(parser)
    _add_routing_flags(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=int, metavar="N", help="of the data, the weights and the order (default 0)")
    add("--out", type=Path, metavar="FOLDER", help="the run's folder; must be new or empty")
    add(
        "--resume",
        type=Path,
        metavar="PATH",
        help="go on with a run: its folder (from its newest checkpoint) or one of its "
        "checkpoints. The run keeps its settings; only --epochs (more), --workers, --device, "
        "--backend and --out (go on in a new folder) may be given",
    )
    return parser


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--model",
        choices=models.names(),
        help="logo_capsnet (default): colour, for this job; politically_correct: the 28x28 grey network of 2017",
    )
    add("--epochs", type=int, metavar="N", help=f"times to see every image {_by_model('epochs')}")
    add("--batch-size", type=int, metavar="N", help=f"images a step {_by_model('batch_size')}")
    add(
        "--lr",
        type=float,
        metavar="RATE",
        help="peak learning rate of AdamW: it rises over the first 5 %% of all steps and falls "
        f"to 0 along a cosine {_by_model('learning_rate')}",
    )
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="run the network in bfloat16 where that is safe; weights stay float32 (default: on "
        "CPUs with instructions for it, AVX512-BF16 or AMX; off elsewhere)",
    )
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="keep the channels of a pixel side by side in memory, which makes some convolutions "
        f"faster {_by_model('channels_last')}",
    )
    add(
        "--device",
        metavar="NAME",
        help="auto (default: a GPU if torch sees one), cpu, cuda or cuda:N",
    )
    add(
        "--limit-batches",
        type=int,
        metavar="N",
        help="use only the first N batches of every pass over images: a quick look whether everything works",
    )


def _by_model(name: str) -> str:
    defaults = ((model, getattr(models.get(model).DEFAULTS, name)) for model in models.names())
    values = (f"{model} {'on' if value is True else 'off' if value is False else value}" for model, value in defaults)
    return f"(default: {', '.join(values)})"


def _add_routing_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("routing").add_argument
    add(
        "--iterations",
        type=int,
        metavar="R",
        help="routing iterations (default 3, as in the paper); 1 couples all capsules equally",
    )
    add(
        "--routing-grad",
        choices=ROUTING_GRADS,
        help="full (default): backward through all iterations; last: the last coupling "
        "coefficients taken as constants, cheaper",
    )
    add(
        "--backend",
        choices=tuple(backends.BACKENDS),
        help="what computes the capsule layers (default: the fastest that runs here; `python -m "
        "caps_kernels` lists them with reasons); an explicit choice runs or is refused",
    )


def _data(text: str) -> str:
    kind, _, path = text.partition(":")
    if kind == "rs" and path:
        # A run may be resumed from another working directory.
        return f"rs:{Path(path).expanduser().absolute()}"
    if text != "icons":
        raise argparse.ArgumentTypeError(f"{text!r} is neither icons nor rs:FOLDER")
    return text


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.lower().partition("x")
    try:
        return (int(height if x else width), int(width))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of pixels nor WIDTHxHEIGHT, as in 180x100"
        ) from None


def resolve(given: dict[str, Any]) -> Settings:
    """The settings of a new run: the flags given, and defaults for the others.

    Raises:
        TrainingError: a value is out of range.
    """
    name = given.get("model", models.names()[0])
    model = models.get(name)
    data = given.get("data", "icons")
    settings: dict[str, Any] = {
        "data": data,
        "model": name,
        "image_size": model.IMAGE_SIZE,
        "classes": generated.CLASSES if data == "icons" else None,
        "images_per_class": generated.IMAGES_PER_CLASS if data == "icons" else None,
        "epochs": model.DEFAULTS.epochs,
        "batch_size": model.DEFAULTS.batch_size,
        "lr": model.DEFAULTS.learning_rate,
        "weight_decay": model.DEFAULTS.weight_decay,
        "iterations": 3,
        "routing_grad": "full",
        "backend": None,
        "amp": learner.suits_bfloat16(learner.pick_device(given.get("device", "auto"))),
        "channels_last": model.DEFAULTS.channels_last,
        "workers": None,
        "seed": 0,
        "device": "auto",
        "limit_batches": None,
        "presence_threshold": model.DEFAULTS.presence_threshold,
    }
    return Settings(**{**settings, **given})


def load_data(settings: Settings) -> LogoData:
    """The data of a run; makes it where that was not done before.

    Raises:
        DataError: it cannot be used.
    """
    return logos.load(
        settings.data,
        size=settings.image_size,
        classes=settings.classes,
        images_per_class=settings.images_per_class,
        seed=settings.seed,
        workers=None if settings.workers is None else max(1, settings.workers),
        progress=sys.stderr.isatty(),
    )


def train(given: dict[str, Any], out: Path | None, path: Path | None) -> int:
    """Start a run, or go on with the one at `path`; returns the exit status.

    Args:
        given: the flags of settings on the command line, by setting name.
        out: the folder for a new run, or to go on in; None chooses one.
        path: a run's folder or a checkpoint to go on from, or None.

    Raises:
        TrainingError, DataError, BackendError: refused or failed; the message is for the user.
    """
    resumed = resume.find(path, given) if path is not None else None
    settings = resolve(given) if resumed is None else resumed.settings
    in_place = resumed.run if resumed is not None and out is None else None
    with contextlib.ExitStack() as locks:
        if in_place is not None:
            locks.enter_context(in_place.lock())
            run = in_place
        else:
            run = RunDir(out or run_dir.default_folder(settings.model, settings.data))
            run_dir.check_free(run.path)
        device = learner.pick_device(settings.device)
        make_deterministic(device)
        learner.rehearse(settings, device)
        data = load_data(settings)
        checkpoint.seed_everything(settings.seed)
        ready = learner.build(settings, len(data.classes), device)
        trainer = Trainer(settings, ready, data, run)
        if resumed is not None:
            restore(trainer, resumed)
        # From here on something is written.
        if in_place is None:
            run_dir.create(run.path, settings, data.classes, learner.versions())
            locks.enter_context(run.lock())
        else:
            run.write_config(settings, data.classes, learner.versions())
        if resumed is not None:
            trainer.best_rank = resume.prepare_folder(resumed, run, print)
        describe(trainer)
        return fit(trainer)


def make_deterministic(device: torch.device) -> None:
    """Have torch choose algorithms that give the same bits each time, where that costs little."""
    if device.type == "cpu":
        # The same as use_deterministic_algorithms(True, warn_only=True), which imports for seconds.
        torch.set_deterministic_debug_mode("warn")
        # Filling fresh memory finds bugs, costs time, and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def restore(trainer: Trainer, resumed: Resumed) -> None:
    """Put the trainer where the checkpoint left off, and say what that is.

    Raises:
        TrainingError: the checkpoint does not fit; the newest intact one before it is named.
    """
    saved, settings = resumed.checkpoint, resumed.settings
    if saved is None or resumed.file is None:
        print("The run was stopped before its first checkpoint; it begins anew.", flush=True)
        return
    try:
        trainer.restore(saved)
    except CheckpointError as error:
        raise CheckpointError(f"{resumed.file}: {error}. {resume.advice(resumed.file, resumed.run)}") from error
    done = f"{saved.epoch} epochs" + (f" and {saved.batch} batches" if saved.batch else "")
    print(f"Going on from {resumed.file}, after {done}.")
    if settings.epochs > saved.settings.epochs:
        print(
            f"{settings.epochs} epochs instead of {saved.settings.epochs}: from here on the "
            f"learning rate is that of a run of {settings.epochs}, so it jumps up once.",
            flush=True,
        )
    if changed := resume.changed_versions(saved):
        print(f"The last bits may come out differently than in one go: {', '.join(changed)}")


def describe(trainer: Trainer) -> None:
    """Print what is about to be trained, and the heading of the epochs' lines."""
    settings, data, ready = trainer.settings, trainer.data, trainer.learner
    weights = sum(parameter.numel() for parameter in ready.network.parameters())
    where = str(ready.device)
    if ready.device.type == "cpu":
        where += f" with {torch.get_num_threads()} threads"
    if settings.amp:
        where += ", in bfloat16"
    print(
        f"data     {settings.data}: {len(data.train):,} training and {len(data.validation):,} "
        f"validation images of {shown(settings.image_size)}, {len(data.classes)} classes\n"
        f"model    {settings.model}: {weights:,} weights, on {where}\n"
        f"run      {trainer.run.path}: {settings.epochs} epochs of {trainer.steps_per_epoch} "
        "batches"
    )
    if trainer.epoch < settings.epochs:
        print("\n" + report.HEADER, flush=True)


def fit(trainer: Trainer) -> int:
    """Train to the end and print the table, or stop in good order; returns the exit status."""
    run = trainer.run
    with Interrupts() as interrupts:
        finished = trainer.fit(interrupts)
    if not finished:
        command = shlex.join(["python", sys.argv[0], "--resume", str(run.path)])
        print(f"Stopped and saved. To go on:\n  {command}", flush=True)
        return 128 + interrupts.signal
    best = checkpoint.load(run.best)
    trainer.learner.network.load_state_dict(best.model)
    splits = {"validation": trainer.data.validation, **trainer.data.tests}
    found = {name: evaluate(trainer.learner, split, trainer.settings, name) for name, split in splits.items()}
    plots.draw_confusion(found["validation"].confusion, trainer.data.classes, run.confusion)
    metrics = {name: evaluation.metrics for name, evaluation in found.items()}
    print("\n" + report.final_table(metrics, trainer.history, best.epoch, trainer.learner.device))
    print(f"{'left in':<36}  {run.path}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's own); returns the exit status."""
    flags = {k: v for k, v in vars(build_parser().parse_args(argv)).items() if v is not None}
    out, path = flags.pop("out", None), flags.pop("resume", None)
    try:
        return train(flags, out, path)
    except TrainingError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except (DataError, BackendError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"train.py: {error}. Try a smaller --batch-size, or --amp", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain.py: stopped outside of training; nothing is lost", file=sys.stderr)
        return 130


def _plain_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


if __name__ == "__main__":
    warnings.formatwarning = _plain_warning
    sys.exit(main())

"""The training loop: epochs, validation, and a checkpoint after each."""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from logos.splits import LogoData, Split
from training import batches, checkpoint, plots, report
from training.checkpoint import Checkpoint, CheckpointError
from training.errors import NonFiniteLossError, TrainingError
from training.interrupts import Interrupts
from training.learner import Learner, versions
from training.metrics import Metrics, RunningSums, confusion
from training.run_dir import RunDir
from training.settings import Settings

# Reading a loss makes the CPU wait for the GPU, so there it is read in groups.
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Evaluation:
    """What a network does on one split."""

    metrics: Metrics
    confusion: Tensor
    """[classes, classes], long: images with one logo, row the true class, column the predicted."""


class StoppedError(Exception):
    """A signal asked to stop."""


def evaluate(
    learner: Learner,
    split: Split,
    settings: Settings,
    name: str,
    interrupts: Interrupts | None = None,
) -> Evaluation:
    """Run the network over a split without learning.

    Raises:
        StoppedError: a signal came in between.
    """
    sums = RunningSums(settings.presence_threshold, learner.device)
    classes = split.targets.shape[1]
    table = torch.zeros(classes, classes, dtype=torch.long)
    total = batches.count(len(split), settings.batch_size, settings.limit_batches)
    indices = range(len(split))[: total * settings.batch_size]
    learner.network.eval()
    with (
        torch.no_grad(),
        tqdm(total=total, desc=name, unit="batch", leave=False, disable=None) as bar,
    ):
        for images, targets in batches.iterate(
            split, indices, settings.batch_size, loader_workers(settings), learner.device
        ):
            loss, scores = learner.forward(images, targets)
            sums.add(loss, scores, targets)
            table += confusion(scores, targets)
            bar.update()
            if interrupts is not None and interrupts.signal:
                raise StoppedError
    return Evaluation(sums.metrics(), table)


def loader_workers(settings: Settings) -> int:
    """Processes that decode images during training; the icons lie in memory and need none."""
    if settings.workers is not None:
        return settings.workers
    return min(8, len(os.sched_getaffinity(0))) if settings.data.startswith("rs:") else 0


def data_fingerprint(data: LogoData) -> str:
    """A digest of classes, targets and their order."""
    digest = hashlib.sha256("\0".join(data.classes).encode())
    for split in (data.train, data.validation):
        digest.update(repr(split.targets.shape).encode())
        digest.update(split.targets.tobytes())
    return digest.hexdigest()


class Trainer:
    """A run in progress: `fit` trains to the end or a signal, `restore` goes to a checkpoint."""

    def __init__(self, settings: Settings, learner: Learner, data: LogoData, run: RunDir) -> None:
        self.settings = settings
        self.learner = learner
        self.data = data
        self.run = run
        self.optimizer = torch.optim.AdamW(
            learner.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.steps_per_epoch = batches.count(len(data.train), settings.batch_size, settings.limit_batches)
        self.fingerprint = data_fingerprint(data)
        self.epoch = 0
        """Whole epochs done."""
        self.history: list[dict[str, float]] = []
        self.best_rank: tuple[float, float] | None = None
        self._begin_epoch()
        self._elapsed_before = 0.0
        self._started = time.perf_counter()

    def _begin_epoch(self) -> None:
        self.batch = 0
        self.train_seconds = 0.0
        self.sums = RunningSums(self.settings.presence_threshold, self.learner.device)

    @property
    def elapsed(self) -> float:
        """Seconds spent training and validating, those before a resume included."""
        return self._elapsed_before + time.perf_counter() - self._started

    def checkpoint(self) -> Checkpoint:
        """The state as of now."""
        return Checkpoint(
            settings=self.settings,
            classes=list(self.data.classes),
            data_fingerprint=self.fingerprint,
            versions=versions(),
            model=self.learner.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=checkpoint.rng_state(self.learner.device),
            epoch=self.epoch,
            batch=self.batch,
            sums=self.sums.values(),
            seconds=(self.train_seconds, self.elapsed),
            history=self.history,
        )

    def restore(self, saved: Checkpoint) -> None:
        """Go back to the state of a checkpoint of the same settings and data.

        Raises:
            CheckpointError: its content does not fit the network.
            TrainingError: the run saw other data.
        """
        if saved.data_fingerprint != self.fingerprint:
            raise TrainingError(
                f"the data at {self.settings.data} is not what the run was trained on: "
                "its classes, images or labels have changed. Put the old data back, or start anew"
            )
        try:
            self.learner.network.load_state_dict(saved.model)
            checkpoint.check_optimizer(saved.optimizer, self.optimizer)
            self.optimizer.load_state_dict(saved.optimizer)
            checkpoint.set_rng_state(saved.rng, self.learner.device)
            self.sums = RunningSums(self.settings.presence_threshold, self.learner.device, saved.sums)
            if saved.batch > self.steps_per_epoch or len(saved.sums) != len(RunningSums.NAMES):
                raise ValueError("its position lies outside of the run")
            report.check_history(saved.history, saved.epoch)
        # What is stored decides which line fails and how.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"the checkpoint does not fit the run: {reason}") from error
        self.epoch, self.batch, self.history = saved.epoch, saved.batch, list(saved.history)
        self.train_seconds, self._elapsed_before = saved.seconds
        self._started = time.perf_counter()

    def fit(self, interrupts: Interrupts) -> bool:
        """Train until all epochs are done (True) or a signal came and everything is saved (False).

        Raises:
            NonFiniteLossError: the loss became inf or NaN; the last checkpoint is untouched.
            OSError: a file of the run cannot be written.
        """
        while self.epoch < self.settings.epochs and not interrupts.signal:
            try:
                self._train(interrupts)
                validation = self._validate(interrupts)
            except StoppedError:
                checkpoint.save(self.checkpoint(), self.run.interrupted)
                return False
            self._end_epoch(validation)
        return self.epoch == self.settings.epochs and not interrupts.signal

    def _train(self, interrupts: Interrupts) -> None:
        """The rest of an epoch; raises StoppedError when a signal came in between."""
        size = self.settings.batch_size
        indices = batches.order(len(self.data.train), self.settings.seed, self.epoch)
        indices = indices[self.batch * size : self.steps_per_epoch * size]
        self.learner.network.train()
        check_every = STEPS_BETWEEN_CHECKS[self.learner.device.type]
        unchecked: list[Tensor] = []
        before, began = self.train_seconds, time.perf_counter()
        with tqdm(
            total=self.steps_per_epoch,
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.settings.epochs}",
            unit="batch",
            leave=False,
            disable=None,
        ) as bar:
            for images, targets in batches.iterate(
                self.data.train, indices, size, loader_workers(self.settings), self.learner.device
            ):
                unchecked.append(self._step(images, targets))
                self.batch += 1
                if len(unchecked) == check_every or self.batch == self.steps_per_epoch:
                    bar.set_postfix_str(f"loss {self._check(unchecked):.4f}", refresh=False)
                    unchecked.clear()
                bar.update()
                if interrupts.signal:
                    break
            self._check(unchecked)
        self.train_seconds = before + time.perf_counter() - began
        if interrupts.signal:
            raise StoppedError

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        step = self.epoch * self.steps_per_epoch + self.batch
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, scores = self.learner.forward(images, targets)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.sums.add(loss, scores, targets)
        return loss.detach()

    def _rate(self, step: int) -> float:
        total = self.steps_per_epoch * self.settings.epochs
        return batches.learning_rate(step, total, self.settings.lr)

    def _check(self, losses: list[Tensor]) -> float:
        """Refuse losses of the latest batches that are not finite; returns the last one."""
        values: list[float] = torch.stack(losses).tolist() if losses else []
        for index, value in enumerate(values):
            if not math.isfinite(value):
                self._stop_at(f"batch {self.batch - len(values) + index + 1}", value)
        return values[-1] if values else math.nan

    def _stop_at(self, where: str, loss: float) -> None:
        files = self.run.epoch_files()
        kept = f"{list(files.values())[-1]} is kept" if files else "no epoch was whole yet"
        advice = f"a smaller --lr (this run: {self.settings.lr:g})"
        if self.settings.amp:
            advice += ", or without --amp"
        raise NonFiniteLossError(
            f"the loss became {loss} in epoch {self.epoch + 1}, {where} of {self.steps_per_epoch}; "
            f"stopped. {kept}. Try a new run with {advice}"
        )

    def _validate(self, interrupts: Interrupts) -> Evaluation:
        found = evaluate(self.learner, self.data.validation, self.settings, "validation", interrupts)
        if not math.isfinite(found.metrics.loss):
            self._stop_at("validation after batch " + str(self.batch), found.metrics.loss)
        return found

    def _end_epoch(self, validation: Evaluation) -> None:
        rate = self._rate((self.epoch + 1) * self.steps_per_epoch - 1)
        train = self.sums.metrics()
        self.epoch += 1
        row = report.epoch_row(self.epoch, rate, train, validation.metrics, self.train_seconds, self.elapsed)
        self.history.append(row)
        self._begin_epoch()
        rank = validation.metrics.rank
        paths = [self.run.epoch_file(self.epoch)]
        if self.best_rank is None or rank > self.best_rank:
            self.best_rank = rank
            paths.append(self.run.best)
        # The epoch's checkpoint comes first: everything after it can be made again from it.
        checkpoint.save(self.checkpoint(), *paths)
        self.run.write_metrics(self.history)
        self.run.interrupted.unlink(missing_ok=True)
        plots.draw_curves(self.history, self.run.curves)
        if self.run.best in paths:
            plots.draw_confusion(validation.confusion, self.data.classes, self.run.confusion)
        print(report.epoch_line(row, self.settings.epochs), flush=True)

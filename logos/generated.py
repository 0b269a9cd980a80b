"""The default data: generated once by several processes, cached, and read memory-mapped.

A cache is a folder of `<split>_images.npy` and `<split>_targets.npy` with a readable `recipe.json`,
named by a hash of that recipe. It is written under another name and renamed when it is whole, under
a lock that lets one process generate and others wait for it; so neither an interruption nor a
second run at the same time leaves a folder that looks whole and is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from logos import augment, brands, icons
from logos.augment import Mark
from logos.splits import DataError, LogoData

CLASSES = 20
IMAGES_PER_CLASS = 500
VALIDATION_SHARE = 10
"""One validation image to so many training images."""
TEST_SHARE = 5
SMALLEST = 16
CHUNK = 100
"""Images to a task of a process."""
MADE_WITH = (icons.SIMPLE_ICONS, icons.FONT_AWESOME, "resvg-py", "pillow", "numpy")
"""Packages whose version can change a pixel, and with it the name of the cache."""


@dataclass(frozen=True)
class Plan:
    """One split to generate: its marks, and how many images."""

    name: str
    number: int
    """Seeds the split's images; never reuse one."""
    marks: tuple[Mark, ...]
    images: int


@dataclass(frozen=True)
class Request:
    """Everything the images depend on, besides the versions of the packages."""

    classes: tuple[brands.Brand, ...]
    images_per_class: int
    size: int
    seed: int

    def plans(self) -> tuple[Plan, ...]:
        """The splits: simple-icons' drawings to train and validate, Font Awesome's to test."""
        slugs = [brand.slug for brand in self.classes]
        colours = [icons.find(icons.SIMPLE_ICONS, slug).colour or (0, 0, 0) for slug in slugs]
        ours = tuple(map(Mark, [icons.SIMPLE_ICONS] * len(slugs), slugs, colours))
        theirs = tuple(
            Mark(icons.FONT_AWESOME, icons.find(icons.FONT_AWESOME, brand.font_awesome).slug, colour)
            for brand, colour in zip(self.classes, colours, strict=True)
        )
        count = len(slugs) * self.images_per_class
        validation = len(slugs) * max(1, self.images_per_class // VALIDATION_SHARE)
        test = len(slugs) * max(1, self.images_per_class // TEST_SHARE)
        return (
            Plan("train", 0, ours, count),
            Plan("validation", 1, ours, validation),
            Plan("other_artist", 2, theirs, test),
        )

    def recipe(self) -> dict[str, Any]:
        """What `recipe.json` holds; its hash names the cache."""
        return {
            "recipe_version": augment.VERSION,
            "seed": self.seed,
            "size": self.size,
            "classes": {brand.slug: brand.font_awesome for brand in self.classes},
            "images": {plan.name: plan.images for plan in self.plans()},
            "packages": {package: version(package) for package in MADE_WITH},
        }

    def key(self) -> str:
        """The name of the cache folder."""
        # No sort_keys: the order of the classes is part of the recipe.
        text = json.dumps(self.recipe())
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class CachedSplit:
    """A generated split in a cache folder; a map-style dataset (`logos.splits.Split`).

    Only the path is pickled, so that a worker process of a data loader maps the file again instead
    of receiving a copy.
    """

    def __init__(self, folder: Path, plan: Plan, size: int) -> None:
        """Maps the split's files.

        Raises:
            DataError: A file is missing, truncated, or not what the plan says.
        """
        self._source = (folder, plan, size)
        shape = (plan.images, 3, size, size)
        self.images = _mapped(folder / f"{plan.name}_images.npy", shape)
        """[N, 3, size, size] RGB, memory-mapped and read-only."""
        self.targets = np.array(_mapped(folder / f"{plan.name}_targets.npy", (plan.images, len(plan.marks))))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, uint8 RGB [3, size, size], and its target, float32 [classes]."""
        image = torch.from_numpy(np.array(self.images[index]))
        return image, torch.from_numpy(self.targets[index].astype(np.float32))

    def __reduce__(self) -> tuple[type[CachedSplit], tuple[Path, Plan, int]]:
        return type(self), self._source


def request(*, size: int, classes: int, images_per_class: int, seed: int) -> Request:
    """Checks the parameters of a data set and chooses its brands.

    Raises:
        DataError: A parameter is out of range.
    """
    _at_least(SMALLEST, "size", size)
    _at_least(1, "images_per_class", images_per_class)
    _at_least(0, "seed", seed)
    return Request(brands.choose(classes, seed), images_per_class, size, seed)


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise DataError(f"{name} is {least} or more for icons, not {value}")


def load(
    *,
    size: int,
    classes: int,
    images_per_class: int,
    seed: int,
    workers: int | None,
    cache_dir: Path | None,
    progress: bool,
) -> LogoData:
    """The generated data, from the cache or made now; see `logos.load`.

    Raises:
        DataError: An argument out of range, an icon missing from an installed pack, a cache folder
            that cannot be written, or a generating process that died.
    """
    wanted = request(size=size, classes=classes, images_per_class=images_per_class, seed=seed)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    _at_least(1, "workers", workers)
    root = cache_dir if cache_dir is not None else default_cache_dir()
    folder = root / wanted.key()
    try:
        splits = _read(folder, wanted)
    except DataError:
        splits = _generate(folder, wanted, workers, progress)
    train, validation, other_artist = splits
    return LogoData(
        tuple(brand.slug for brand in wanted.classes),
        train,
        validation,
        {"other artist": other_artist},
    )


def default_cache_dir() -> Path:
    """Where generated data is kept: `caps_kernels/logos` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "caps_kernels" / "logos"


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder") from error
    if array.shape != shape or array.dtype != np.uint8:
        raise DataError(f"{path} holds {array.dtype} {array.shape}, not uint8 {shape}; delete its folder")
    return array


def _read(folder: Path, request: Request) -> list[CachedSplit]:
    return [CachedSplit(folder, plan, request.size) for plan in request.plans()]


def _generate(folder: Path, request: Request, workers: int, progress: bool) -> list[CachedSplit]:
    """Makes the cache folder, or waits for another process that is making it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), progress):
            with contextlib.suppress(DataError):
                return _read(folder, request)
            _remove_remains(folder)
            draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.draft-", dir=folder.parent))
            try:
                _write(draft, request, workers, progress)
                draft.rename(folder)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(
            f"the generated images cannot be kept in {folder.parent} ({error}); name another "
            "folder with cache_dir or the variable XDG_CACHE_HOME"
        ) from error
    return _read(folder, request)


@contextlib.contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Holds an exclusive lock that the system frees when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print("Another process is generating these images; waiting.", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_remains(folder: Path) -> None:
    """Deletes a spoilt cache and the drafts of killed runs; nobody else can be using them.

    Readers of a spoilt cache do not exist, and a draft belongs to the holder of the lock.
    """
    for remains in [folder, *folder.parent.glob(f"{folder.name}.draft-*")]:
        if remains.is_dir():
            shutil.rmtree(remains)


def _write(folder: Path, request: Request, workers: int, progress: bool) -> None:
    plans = request.plans()
    targets = {plan.name: np.zeros((plan.images, len(plan.marks)), np.uint8) for plan in plans}
    total = sum(plan.images for plan in plans)
    with contextlib.ExitStack() as stack:
        files = {plan.name: stack.enter_context(_empty_images(folder, plan, request.size)) for plan in plans}
        bar = stack.enter_context(tqdm(total=total, desc="generating logos", unit="image", disable=not progress))
        chunks = stack.enter_context(contextlib.closing(_chunks(plans, request, workers)))
        for plan, start, made, labels in chunks:
            files[plan.name].seek((start - plan.images) * made[0].nbytes, os.SEEK_END)
            files[plan.name].write(made.tobytes())
            targets[plan.name][start : start + len(made)] = labels
            bar.update(len(made))
    for plan in plans:
        np.save(folder / f"{plan.name}_targets.npy", targets[plan.name], allow_pickle=False)
    text = json.dumps(request.recipe(), indent=1, ensure_ascii=False)
    (folder / "recipe.json").write_text(text + "\n", encoding="utf-8")


def _empty_images(folder: Path, plan: Plan, size: int) -> BinaryIO:
    """An image file of full length, to be written in any order.

    It is written, not memory-mapped: on a full disk that is an error, not a crash.
    """
    path = folder / f"{plan.name}_images.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (plan.images, 3, size, size))
    return path.open("r+b")


def _chunks(
    plans: Sequence[Plan], request: Request, workers: int
) -> Generator[tuple[Plan, int, NDArray[np.uint8], NDArray[np.uint8]], None, None]:
    """(plan, number of the first image, images, targets) of every chunk, in any order."""
    tasks = [(plan, start) for plan in plans for start in range(0, plan.images, CHUNK)]
    workers = min(workers, len(tasks))
    if workers == 1:
        for plan, start in tasks:
            yield plan, start, *_draw_chunk(plan, start, request.size, request.seed)
        return
    # Not fork: the caller may hold torch's threads. A process that dies takes the pool with it.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        running = {
            pool.submit(_draw_chunk, plan, start, request.size, request.seed): (plan, start) for plan, start in tasks
        }
        for future in as_completed(running):
            plan, start = running.pop(future)
            yield plan, start, *future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that generates images died. Either memory ran out, or the calling script "
            "lacks `if __name__ == '__main__':` around its code, which processes that import it "
            "anew need. workers=1 generates in this process alone."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _draw_chunk(plan: Plan, start: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    samples = [
        augment.draw(plan.marks, size=size, seed=seed, split=plan.number, index=index)
        for index in range(start, min(start + CHUNK, plan.images))
    ]
    return np.stack([s.image for s in samples]), np.stack([s.target for s in samples])

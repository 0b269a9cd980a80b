"""Logos on television frames, from a folder in the format of the 2017 challenge (RS_FORMAT.md)."""

from __future__ import annotations

import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from logos.rs_index import Frame, Skipped, read_index, resolve_inside
from logos.splits import DataError, LogoData

MAX_PIXELS = 32_000_000
"""A frame has 288,000; a few bytes of JPEG can claim billions."""


class FrameSplit:
    """Frames on disk with the set of logos on each; decoded when asked for."""

    targets: NDArray[np.uint8]

    def __init__(self, paths: list[str], targets: NDArray[np.uint8], *, size: tuple[int, int]) -> None:
        """
        Args:
            paths: The N image files.
            targets: [N, classes], 1 where the logo is on the frame.
            size: Height and width that the frames are resized to.
        """
        self.targets = targets
        self._paths = paths
        self._size = size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one frame.

        Args:
            index: Which one.

        Returns:
            The frame, uint8 RGB [3, H, W], and its target, float32 [classes].

        Raises:
            DataError: The file was removed or damaged since `load` checked it.
        """
        path = self._paths[index]
        try:
            image = _decode(path, self._size)
        except Exception as error:
            raise DataError(
                f"{path}: was readable when training started and is not any more ({error}); "
                "restore it, or start again, which leaves it out"
            ) from error
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, torch.from_numpy(self.targets[index].astype(np.float32))


def load(path: Path, *, size: tuple[int, int], progress: bool = True) -> LogoData:
    """Open a data folder and check every frame of it, so that none fails later.

    Frames that are missing or damaged, and labels that labels.pkl does not name, are left out with
    one warning that counts and names them. Every label of a frame counts.

    Args:
        path: The folder with labels.pkl, master.pkl and <id>-<channel>/<folder>/<file>.jpg.
            Without master.pkl the index is built from the folders, without labels.pkl the classes
            are the names found, sorted.
        size: Height and width that the frames are resized to.
        progress: Show a progress bar.

    Returns:
        The classes, the training frames, and the challenge's test frames as validation.

    Raises:
        DataError: The folder cannot be used, or a file in it is malformed or hostile.
    """
    if not os.path.isdir(path):
        problem = "is not a folder" if os.path.lexists(path) else "does not exist"
        raise DataError(
            f"rs:{path}: {problem}; give the folder that holds labels.pkl, master.pkl and the channels' folders"
        )
    root = path.resolve()
    skipped = Skipped()
    index = read_index(root, skipped)
    listed = index.train + index.test
    found = _check_images(str(root), listed, size, skipped, progress=progress)
    train, test = found[: len(index.train)], found[len(index.train) :]
    splits = []
    for name, frames, resolved in (("train", index.train, train), ("test", index.test, test)):
        usable = [(frame, file) for frame, file in zip(frames, resolved, strict=True) if file]
        if not usable:
            raise DataError(
                f"rs:{path}: none of the {len(frames)} frames of {name!r} can be used\n{skipped.summary()}".rstrip()
            )
        targets = np.zeros((len(usable), len(index.classes)), np.uint8)
        for row, (frame, _) in enumerate(usable):
            targets[row, list(frame.classes)] = 1
        splits.append(FrameSplit([file for _, file in usable], targets, size=size))
    for column in np.flatnonzero(splits[0].targets.sum(0, dtype=np.int64) == 0):
        skipped.add("classes without a training frame", index.classes[column])
    if skipped.counts:
        kept = len(splits[0]) + len(splits[1])
        warnings.warn(
            f"rs:{path}: {kept} frames can be used. Left out or missing:\n{skipped.summary()}",
            stacklevel=2,
        )
    return LogoData(index.classes, train=splits[0], validation=splits[1])


def _check_images(
    root: str, frames: list[Frame], size: tuple[int, int], skipped: Skipped, *, progress: bool
) -> list[str | None]:
    """Decode every frame once; the resolved path of each, None where it cannot be used.

    Only decoding finds an image that was cut short. At an eighth of the size, in threads (Pillow
    decodes outside the interpreter lock), that is a fraction of what one epoch costs.
    """
    check = partial(_check_image, root, size=size)
    found: list[str | None] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
        tqdm(total=len(frames), desc="checking frames", disable=not progress) as bar,
    ):
        for frame, (file, problem) in zip(frames, threads.map(check, frames), strict=True):
            if problem:
                skipped.add(problem, frame.path)
            found.append(None if problem else file)
            bar.update()
    return found


def _check_image(root: str, frame: Frame, *, size: tuple[int, int]) -> tuple[str, str | None]:
    file = resolve_inside(root, frame.path)
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return file, "missing images"
    except OSError:
        return file, "missing images"
    try:
        _decode(file, size)
    # Pillow raises OSError, SyntaxError, struct.error and others on damaged files.
    except Exception:
        return file, "damaged images"
    return file, None


def _decode(path: str, size: tuple[int, int]) -> Image.Image:
    height, width = size
    # JPEG alone: other formats have decoders that run outside programs.
    with Image.open(path, formats=("JPEG",)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        # The JPEG decoder halves the image as often as it stays at least this large.
        image.draft("RGB", (width, height))
        rgb: Image.Image = image.convert("RGB")
    return rgb.resize((width, height), Image.Resampling.BILINEAR)

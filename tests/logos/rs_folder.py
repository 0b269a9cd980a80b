"""Write a small data folder in the format of the 2017 challenge, with drawn logos.

    python -m tests.logos.rs_folder OUT --classes 6 --frames 12 --seed 0

Two logos a channel: the first appears alone, the second only together with the first, so that it is
learnt only where every label of a frame counts.
"""

from __future__ import annotations

import argparse
import colorsys
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 400
FRAMES_A_RECORDING = 3


class Label:
    """Pickled as lib.dataset_interface.Label."""

    def __init__(self, name: str, pos: list[int]) -> None:
        self.name = name
        self.pos = pos


class Record:
    """Pickled as lib.dataset_interface.Record."""

    def __init__(self, img_path: str, labels: list[Label]) -> None:
        self.img_path = img_path
        self.labels = labels


Label.__module__ = Record.__module__ = "lib.dataset_interface"


@dataclass
class Folder:
    """What was written: the class names and the records, damage included."""

    classes: tuple[str, ...]
    train: list[Record] = field(default_factory=list)
    test: list[Record] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def write(
    root: Path,
    *,
    classes: int = 4,
    frames: int = 6,
    seed: int = 0,
    master: bool = True,
    labels: bool = True,
    missing: int = 0,
    truncated: int = 0,
    unknown: int = 0,
) -> Folder:
    """Write the folder.

    Args:
        root: Where; made if it is not there.
        classes: How many logos.
        frames: Frames in each leaf folder.
        seed: Of the backgrounds and of the division into train and test.
        master: Write master.pkl; one frame in five of each leaf folder is in 'test'.
        labels: Write labels.pkl.
        missing: How many training frames to delete.
        truncated: How many training frames to cut in half.
        unknown: How many training records to give only a label that labels.pkl does not name.
    """
    rng = np.random.default_rng(seed)
    folder = Folder(tuple(f"station{number}" for number in range(classes)))
    for channel in range((classes + 1) // 2):
        _write_channel(root, channel, folder, frames, rng)
    _write_frame(_made(root / "not_categorized") / "frame.jpg", [], folder.classes, rng)
    _damage(root, folder, missing, truncated, unknown)
    if labels:
        # The real file is not in the order of its indices either.
        indices = {name: index for index, name in reversed(list(enumerate(folder.classes)))}
        (root / "labels.pkl").write_bytes(pickle.dumps(indices, protocol=3))
    if master:
        dump(root / "master.pkl", {"test": folder.test, "train": folder.train})
    return folder


def dump(path: Path, content: object, protocol: int = 3) -> None:
    """Pickle records under the names they had in the challenge's own code."""
    module = ModuleType("lib.dataset_interface")
    module.__dict__.update(Record=Record, Label=Label)
    with patch.dict(sys.modules, {"lib": ModuleType("lib"), module.__name__: module}):
        path.write_bytes(pickle.dumps(content, protocol=protocol))


def _write_channel(root: Path, channel: int, folder: Folder, frames: int, rng: np.random.Generator) -> None:
    name = f"{10106 + 100 * channel}-channel{channel}"
    logos = [
        Label(logo, [x, y, 150, 90])
        for logo, x, y in zip(folder.classes[2 * channel : 2 * channel + 2], (40, 520), (30, 40), strict=False)
    ]
    leaves = {"logo1-0": logos[:1], "nologo": []}
    if len(logos) == 2:
        leaves["logo2-live"] = logos
    for number, (leaf, shown) in enumerate(leaves.items()):
        path = _made(root / name / leaf)
        # A leaf folder without logos has an empty metadata.txt or none.
        if shown or channel % 2:
            lines = [",".join([label.name, *map(str, label.pos)]) for label in shown]
            (path / "metadata.txt").write_text("".join(f"{line}\r\n" for line in lines))
        (path / "desktop.ini").write_bytes(b"[.ShellClassInfo]\r\nIconResource=logo.jpg,0\r\n")
        _write_frame(path / "logo.jpg", shown, folder.classes, rng)
        test = set(rng.choice(frames, max(1, frames // 5), replace=False).tolist())
        for frame in range(frames):
            recording, place = divmod(frame, FRAMES_A_RECORDING)
            file = f"{name[:5]}_2017-11-07_{10 + number}.{recording:02}.11_{place}.jpg"
            _write_frame(path / file, shown, folder.classes, rng)
            part = folder.test if frame in test else folder.train
            part.append(Record(f"{name}/{leaf}/{file}", shown))
    unused = _made(root / name / "difficult_not_labeled")
    _write_frame(unused / "frame.jpg", logos, folder.classes, rng)


def _write_frame(path: Path, logos: Sequence[Label], classes: Sequence[str], rng: np.random.Generator) -> None:
    coarse = rng.integers(0, 256, (5, 9, 3), dtype=np.uint8)
    frame = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(frame)
    for logo in logos:
        _draw_logo(draw, classes.index(logo.name), len(classes), logo.pos)
    frame.save(path, "JPEG", quality=85)


def _draw_logo(draw: ImageDraw.ImageDraw, number: int, classes: int, pos: list[int]) -> None:
    x, y, width, height = pos
    box = (x, y, x + width, y + height)
    red, green, blue = colorsys.hsv_to_rgb(number / classes, 0.9, 1.0)
    colour = (int(255 * red), int(255 * green), int(255 * blue))
    if number % 3 == 0:
        draw.rectangle(box, fill=colour, outline="white", width=6)
    elif number % 3 == 1:
        draw.ellipse(box, fill=colour, outline="black", width=6)
    else:
        triangle = [(x, y + height), (x + width // 2, y), (x + width, y + height)]
        draw.polygon(triangle, fill=colour, outline="white", width=6)
    centre = (x + width // 2, y + 2 * height // 3)
    draw.text(centre, str(number), fill="black", anchor="mm", font=ImageFont.load_default(44))


def _damage(root: Path, folder: Folder, missing: int, truncated: int, unknown: int) -> None:
    victims = iter(folder.train)
    for _, record in zip(range(missing), victims, strict=False):
        (root / record.img_path).unlink()
        folder.missing.append(record.img_path)
    for _, record in zip(range(truncated), victims, strict=False):
        data = (root / record.img_path).read_bytes()
        (root / record.img_path).write_bytes(data[: len(data) // 2])
        folder.truncated.append(record.img_path)
    for _, record in zip(range(unknown), victims, strict=False):
        record.labels = [Label("unlisted", [0, 0, 10, 10])]
        folder.unknown.append(record.img_path)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.logos.rs_folder",
        description="Write a small data folder in the format of the 2017 challenge: television "
        "frames of 720x400 with drawn logos, labels.pkl and master.pkl. Train on it with: "
        "python train.py --data rs:OUT --model politically_correct --epochs 2",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; made if missing")
    parser.add_argument(
        "--classes", type=int, metavar="N", default=6, help="logos, two a channel (default %(default)s)"
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", default=12, help="frames a leaf folder (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the pictures and the split")
    parser.add_argument("--no-master", action="store_true", help="leave master.pkl out: indexed from the folders")
    parser.add_argument("--no-labels", action="store_true", help="leave labels.pkl out: classes are the names found")
    for name, what in (
        ("missing", "training frames to delete"),
        ("truncated", "training frames to cut in half"),
        ("unknown", "training records to give a label that labels.pkl does not name"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", default=0, help=f"{what} (default 0)")
    options = parser.parse_args()
    if options.classes < 1 or options.frames < 2:
        parser.error("at least one class and two frames are needed")
    folder = write(
        options.out,
        classes=options.classes,
        frames=options.frames,
        seed=options.seed,
        master=not options.no_master,
        labels=not options.no_labels,
        missing=options.missing,
        truncated=options.truncated,
        unknown=options.unknown,
    )
    print(
        f"{options.out}: {len(folder.train)} training and {len(folder.test)} test frames, {len(folder.classes)} classes"
    )


if __name__ == "__main__":
    main()

"""Which frames of a folder in the 2017 challenge's format belong to training and to test.

The index comes from labels.pkl and master.pkl where they are there, otherwise from the folders.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from logos.rs_pickle import Label, Record, is_name, read_labels, read_master, show
from logos.splits import DataError

SKIPPED_FOLDERS = frozenset({"not_categorized", "difficult_not_labeled"})
MAX_PATH_CHARACTERS = 1024
_MAX_METADATA_BYTES = 2**20
_TEST_SHARE = 0.2
_EXAMPLES = 3
# A recording in the names that the challenge gave its frames: "<id>_<date>_<time>_<number>.jpg".
_NUMBERED_FRAME = re.compile(r"(.+_\d{4}-\d\d-\d\d_\d\d\.\d\d\.\d\d)_\d+")


@dataclass
class Skipped:
    """What was left out, by reason: how many and the first few names."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, name: str) -> None:
        """Count one more thing left out."""
        self.counts[reason] += 1
        names = self.examples[reason]
        if len(names) <= _EXAMPLES and name not in names:
            names.append(name)

    def summary(self) -> str:
        """One line a reason: the count and the first few names."""
        lines = []
        for reason, count in self.counts.items():
            names = [show(name) for name in self.examples[reason]]
            more = ", …" if len(names) > _EXAMPLES else ""
            lines.append(f"  {reason}: {count} ({', '.join(names[:_EXAMPLES])}{more})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Frame:
    """A frame by its path relative to the data folder, and the indices of its classes."""

    path: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """The class names and the frames of a data folder, images not yet looked at."""

    classes: tuple[str, ...]
    train: list[Frame]
    test: list[Frame]


def read_index(root: Path, skipped: Skipped) -> Index:
    """Read the index of a data folder.

    Args:
        root: The folder.
        skipped: Takes what is left out and why.

    Returns:
        The class names, from labels.pkl or else all names found, sorted; and the frames.

    Raises:
        DataError: A file is malformed or hostile, or there is no frame or no label at all.
    """
    master, labels = root / "master.pkl", root / "labels.pkl"
    if os.path.lexists(master):
        train, test = read_master(master)
        for record in (*train, *test):
            check_path(master, record.img_path)
    else:
        train, test = index_folders(root, skipped)
    if os.path.lexists(labels):
        classes = read_labels(labels)
    else:
        classes = tuple(sorted({label.name for record in (*train, *test) for label in record.labels}))
        if not classes:
            raise DataError(
                f"{root}: no frame has a label; expected labels.pkl, master.pkl or "
                "<id>-<channel>/<folder>/metadata.txt with lines name,x,y,w,h"
            )
    columns = {name: column for column, name in enumerate(classes)}
    seen: set[str] = set()
    return Index(
        classes,
        # Training first: a frame listed in both is kept there and does not flatter the test.
        _frames(train, columns, seen, skipped),
        _frames(test, columns, seen, skipped),
    )


def check_path(source: Path, img_path: str) -> None:
    """Refuse a path that is not plainly relative: it could lead anywhere outside the data folder.

    Args:
        source: The file that holds the path, for the message.
        img_path: The path; "/" separates its parts.

    Raises:
        DataError: The path is absolute, has empty, "." or ".." parts, backslashes or NUL, names a
            drive, is too long, or is no valid text.
    """
    parts = img_path.split("/")
    if not img_path:
        problem = "is empty"
    elif len(img_path) > MAX_PATH_CHARACTERS:
        problem = f"is longer than {MAX_PATH_CHARACTERS} characters"
    elif img_path.startswith("/") or re.match("[A-Za-z]:", img_path):
        problem = "is absolute"
    elif ".." in parts:
        problem = "contains '..'"
    elif "" in parts or "." in parts:
        problem = "has an empty part or '.'"
    elif "\\" in img_path or "\0" in img_path:
        problem = "contains a backslash or NUL"
    elif not img_path.isascii() and not _is_utf8(img_path):
        problem = "is not valid text"
    else:
        return
    raise DataError(
        f"{source}: the image path {show(img_path)} {problem}; only paths such as "
        "'<id>-<channel>/<folder>/<file>.jpg' inside the data folder are read"
    )


def resolve_inside(root: str, relative: str) -> str:
    """Follow the links of a path and make sure that it stays in the data folder.

    Args:
        root: The data folder, resolved.
        relative: A path below it.

    Returns:
        The resolved path.

    Raises:
        DataError: A symbolic link leads out of the folder.
    """
    resolved = os.path.realpath(os.path.join(root, relative))
    if not resolved.startswith(root.rstrip(os.sep) + os.sep):
        raise DataError(
            f"{root}: {show(relative)} leads out of the data folder through a symbolic link; "
            "put the files themselves into the folder"
        )
    return resolved


def index_folders(root: Path, skipped: Skipped) -> tuple[list[Record], list[Record]]:
    """Build the index from the folders: every .jpg of a leaf folder with its metadata.txt's labels.

    One recording in five of each leaf folder goes to test. Which ones follows from a hash of their
    names. Frames of one recording are a moment apart, so they stay together; a folder with several
    recordings has some in both parts.

    Args:
        root: The data folder.
        skipped: Takes what is left out and why.

    Returns:
        The training records and the test records, sorted by path.

    Raises:
        DataError: No frame was found, or a folder or a metadata.txt cannot be read.
    """
    records: list[Record] = []
    for folder, subfolders, files in os.walk(root, onerror=_refuse_folder):
        relative = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        for name in [name for name in subfolders if os.path.islink(os.path.join(folder, name))]:
            skipped.add("linked folders, which are not followed", relative + name)
            subfolders.remove(name)
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        frames = [relative + name for name in sorted(files) if _is_frame(name)]
        if subfolders:
            for frame in frames:
                skipped.add("images outside of the leaf folders", frame)
        elif frames:
            labels = _folder_labels(root, relative, skipped)
            if labels is None:
                for frame in frames:
                    skipped.add("frames without a usable label in metadata.txt", frame)
            else:
                records += [Record(frame, labels) for frame in frames]
    if not records:
        raise DataError(f"{root}: no frames found; expected master.pkl or <id>-<channel>/<folder>/<file>.jpg")
    recordings = _test_recordings(records)
    return (
        [record for record in records if _recording(record.img_path) not in recordings],
        [record for record in records if _recording(record.img_path) in recordings],
    )


def _frames(records: Iterable[Record], columns: dict[str, int], seen: set[str], skipped: Skipped) -> list[Frame]:
    frames = []
    for record in records:
        if record.img_path in seen:
            skipped.add("frames listed twice", record.img_path)
            continue
        seen.add(record.img_path)
        if not SKIPPED_FOLDERS.isdisjoint(record.img_path.split("/")[:-1]):
            skipped.add("frames in folders that are not used", record.img_path)
            continue
        for label in record.labels:
            if label.name not in columns:
                skipped.add("labels that labels.pkl does not name", label.name)
        known = {columns[label.name] for label in record.labels if label.name in columns}
        if record.labels and not known:
            # A row of zeros would call it a frame without a logo, which it is not.
            skipped.add("frames with unknown labels only", record.img_path)
        else:
            frames.append(Frame(record.img_path, tuple(sorted(known))))
    return frames


def _folder_labels(root: Path, relative: str, skipped: Skipped) -> tuple[Label, ...] | None:
    """The labels of a leaf folder's frames; None where there are lines but no usable one."""
    name = relative + "metadata.txt"
    if not os.path.lexists(root / name):
        return ()
    path = Path(resolve_inside(str(root), name))
    try:
        if not path.is_file() or path.stat().st_size > _MAX_METADATA_BYTES:
            raise DataError(
                f"{path}: not a regular file of at most {_MAX_METADATA_BYTES} bytes; expected lines name,x,y,w,h"
            )
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    labels = []
    malformed = False
    for number, line in enumerate(lines, start=1):
        if line.strip():
            label = _parse_label(line)
            if label is None:
                skipped.add("malformed lines of metadata.txt", f"{name}:{number}")
                malformed = True
            else:
                labels.append(label)
    return None if malformed and not labels else tuple(labels)


def _parse_label(line: bytes) -> Label | None:
    try:
        ((name, *numbers),) = csv.reader([line.decode()])
        x, y, width, height = (int(number) for number in numbers)
    except (ValueError, csv.Error):
        return None
    return Label(name, (x, y, width, height)) if is_name(name) else None


def _test_recordings(records: Iterable[Record]) -> set[str]:
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        folders[record.img_path.rpartition("/")[0]].add(_recording(record.img_path))
    test: set[str] = set()
    decided: set[str] = set()
    # A recording may run on in another folder, and the first of them decides: the smallest, because
    # the only recording of a logo must not be lost to training.
    for names in sorted(folders.values(), key=len):
        wanted = max(1, round(_TEST_SHARE * len(names))) if len(names) > 1 else 0
        free = sorted(names - decided, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        test.update(free[: max(0, wanted - len(names & test))])
        decided |= names
    return test


def _recording(img_path: str) -> str:
    """The channel and the recording that a frame was taken from; any other frame stands alone."""
    folder, _, file = img_path.rpartition("/")
    numbered = _NUMBERED_FRAME.fullmatch(file.rpartition(".")[0])
    return f"{folder.partition('/')[0]}/{numbered[1]}" if numbered else img_path


def _is_frame(name: str) -> bool:
    lower = name.lower()
    return lower.endswith((".jpg", ".jpeg")) and lower != "logo.jpg"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logos.rs_index import Skipped, index_folders, read_index
from logos.rs_pickle import Label, Record
from logos.splits import DataError
from tests.logos import rs_folder


def make(root: Path, *names: str, metadata: bytes | None = None) -> None:
    """Empty frames; with metadata.txt beside the first."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if metadata is not None:
        (root / names[0]).with_name("metadata.txt").write_bytes(metadata)


def labels_of(root: Path) -> tuple[dict[str, tuple[Label, ...]], str]:
    skipped = Skipped()
    train, test = index_folders(root, skipped)
    return {record.img_path: record.labels for record in train + test}, skipped.summary()


def test_folders_give_the_same_records_as_master(tmp_path: Path) -> None:
    folder = rs_folder.write(tmp_path, classes=3, frames=4)
    expected = {
        record.img_path: tuple(
            Label(label.name, (label.pos[0], label.pos[1], label.pos[2], label.pos[3])) for label in record.labels
        )
        for record in folder.train + folder.test
    }
    assert len(expected) == 20
    assert labels_of(tmp_path) == (expected, "")


def test_classes_without_labels_and_master(tmp_path: Path) -> None:
    rs_folder.write(tmp_path, classes=3, frames=4, labels=False, master=False)
    index = read_index(tmp_path, Skipped())
    assert index.classes == ("station0", "station1", "station2")
    live = {frame.classes for frame in index.train if "10106-channel0/logo2-live" in frame.path}
    assert live == {(0, 1)}


def test_recordings_stay_together_and_every_folder_is_in_both_parts(tmp_path: Path) -> None:
    frames = [
        f"1-c/{leaf}/1_2017-11-07_10.{minute:02}.11_{number}.jpg"
        for leaf in ("logo1", "logo2")
        for minute in range(10 if leaf == "logo1" else 2)
        for number in range(3)
    ]
    make(tmp_path, *frames)
    # The recording at 10.00 runs on in a third folder, which holds nothing else.
    make(tmp_path, "1-c/logo3/1_2017-11-07_10.00.11_7.jpg")
    train, test = index_folders(tmp_path, Skipped())
    assert sorted(record.img_path for record in train + test) == sorted(
        [*frames, "1-c/logo3/1_2017-11-07_10.00.11_7.jpg"]
    )

    def recordings(records: list[Record]) -> set[str]:
        return {record.img_path.rpartition("/")[2].rpartition("_")[0] for record in records}

    assert not recordings(train) & recordings(test)
    assert "1_2017-11-07_10.00.11" in recordings(train)
    for leaf in ("logo1", "logo2"):
        assert any(leaf in record.img_path for record in train)
        assert any(leaf in record.img_path for record in test)
    assert sum("logo1" in record.img_path for record in test) == 6
    again = index_folders(tmp_path, Skipped())
    assert again == (train, test)


def test_the_split_follows_from_names_alone(tmp_path: Path) -> None:
    names = [f"1-c/logo/{number:02}.jpg" for number in range(20)]
    make(tmp_path / "one", *names)
    make(tmp_path / "two", *names[::-1])
    first, second = (index_folders(tmp_path / part, Skipped()) for part in ("one", "two"))
    assert first == second
    # Written out, because any machine has to arrive at the same ones.
    assert [record.img_path for record in first[1]] == [f"1-c/logo/{number}.jpg" for number in ("03", "08", "13", "18")]


def test_what_is_no_frame_is_not_indexed(tmp_path: Path) -> None:
    make(
        tmp_path,
        "1-c/f/a.jpg",
        "1-c/f/B.JPEG",
        "1-c/f/logo.jpg",
        "1-c/f/Logo.JPG",
        "1-c/f/desktop.ini",
        "1-c/f/Thumbs.db",
        "1-c/f/not_categorized/c.jpg",
        "1-c/difficult_not_labeled/deep/d.jpg",
        "not_categorized/e.jpg",
        "1-c/overview.jpg",
        metadata=b"zdf,1,2,3,4",
    )
    zdf = (Label("zdf", (1, 2, 3, 4)),)
    assert labels_of(tmp_path) == (
        {"1-c/f/a.jpg": zdf, "1-c/f/B.JPEG": zdf},
        "  images outside of the leaf folders: 1 ('1-c/overview.jpg')",
    )


@pytest.mark.parametrize("metadata", [None, b"", b"\r\n\n"])
def test_no_label_means_no_logo(tmp_path: Path, metadata: bytes | None) -> None:
    make(tmp_path, "1-c/f/a.jpg", metadata=metadata)
    assert labels_of(tmp_path) == ({"1-c/f/a.jpg": ()}, "")


@pytest.mark.parametrize(
    "line",
    [
        b"zdf",
        b"zdf,1,2,3",
        b"zdf,1,2,3,4,5",
        b"zdf,1,2,3,x",
        b"zdf,1,2,3,nan",
        b",1,2,3,4",
        b"\xff\xfe,1,2,3,4",
        b"z\0df,1,2,3,4",
        b'"zdf,1,2,3,4',
        b"zdf,1,2,3," + b"9" * 5000,
        b"z" * 200_000 + b",1,2,3,4",
    ],
)
def test_malformed_lines_are_counted_and_left_out(tmp_path: Path, line: bytes) -> None:
    make(tmp_path, "1-c/f/a.jpg", metadata=b"\xef\xbb\xbfard,1,2,3,4\r\n" + line + b"\r\n")
    make(tmp_path, "1-c/g/b.jpg", metadata=line)
    records, summary = labels_of(tmp_path)
    # With no usable line left, "b.jpg" would pass for a frame without a logo.
    assert records == {"1-c/f/a.jpg": (Label("ard", (1, 2, 3, 4)),)}
    assert "malformed lines of metadata.txt: 2 ('1-c/f/metadata.txt:2', '1-c/g/meta" in summary
    assert "frames without a usable label in metadata.txt: 1 ('1-c/g/b.jpg'" in summary


def test_a_quoted_name_may_hold_a_comma(tmp_path: Path) -> None:
    make(tmp_path, "1-c/f/a.jpg", metadata=b'"one, two", 1, 2, 3, 4\n')
    assert labels_of(tmp_path)[0] == {"1-c/f/a.jpg": (Label("one, two", (1, 2, 3, 4)),)}


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    make(outside, "x/a.jpg", metadata=b"zdf,1,2,3,4")
    root = tmp_path / "data"
    make(root, "1-c/f/a.jpg")
    (root / "2-d").symlink_to(outside)
    records, summary = labels_of(root)
    assert list(records) == ["1-c/f/a.jpg"]
    assert summary == "  linked folders, which are not followed: 1 ('2-d')"
    (root / "1-c/f/metadata.txt").symlink_to(outside / "x/metadata.txt")
    with pytest.raises(DataError, match=r"'1-c/f/metadata.txt' leads out of the data folder"):
        labels_of(root)


def test_metadata_that_is_no_small_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "1-c/f/a.jpg", metadata=b"\n" * (2**20 + 1))
    with pytest.raises(DataError, match=r"metadata.txt: not a regular file of at most"):
        labels_of(tmp_path)
    (tmp_path / "1-c/f/metadata.txt").unlink()
    (tmp_path / "1-c/f/metadata.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"nowhere: not a regular file"):
        labels_of(tmp_path)


def test_the_generator_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.logos.rs_folder", str(tmp_path), "--no-master"]
    options = ["--classes", "2", "--frames", "2", "--seed", "3"]
    cwd = Path(__file__).parents[2]
    result = subprocess.run([*command, *options], cwd=cwd, capture_output=True, text=True, check=True)
    assert result.stdout == f"{tmp_path}: 3 training and 3 test frames, 2 classes\n"
    assert not (tmp_path / "master.pkl").exists()
    assert read_index(tmp_path, Skipped()).classes == ("station0", "station1")

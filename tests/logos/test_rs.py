from __future__ import annotations

import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from logos import rs
from logos.splits import DataError, LogoData
from tests.logos import rs_folder
from tests.logos.rs_folder import Folder, Label, Record

SIZE = (50, 90)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Folder]:
    root = tmp_path_factory.mktemp("rs")
    return root, rs_folder.write(root, classes=3, frames=5)


def load(root: Path) -> LogoData:
    """Load where nothing may be left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rs.load(root, size=SIZE, progress=False)


def load_with_warning(root: Path) -> tuple[LogoData, str]:
    with pytest.warns(UserWarning, match="frames can be used") as caught:
        data = rs.load(root, size=SIZE, progress=False)
    assert len(caught) == 1
    return data, str(caught[0].message)


def multi_hot(records: list[Record], classes: tuple[str, ...]) -> list[list[int]]:
    return [[int(name in {label.name for label in record.labels}) for name in classes] for record in records]


def small_folder(root: Path, records: list[Record], classes: tuple[str, ...] = ("a", "b")) -> None:
    """Images of a few pixels for the records, and one test frame."""
    for record in [*records, Record("1-c/test/t.jpg", [])]:
        path = root / record.img_path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 8), "red").save(path)
    (root / "labels.pkl").write_bytes(pickle.dumps({name: i for i, name in enumerate(classes)}))
    rs_folder.dump(root / "master.pkl", {"train": records, "test": [Record("1-c/test/t.jpg", [])]})


def everything() -> list[Record]:
    """A frame for each of the classes of `small_folder`."""
    return [
        Record("1-c/f/a.jpg", [Label("a", [0, 0, 4, 4])]),
        Record("1-c/f/b.jpg", [Label("b", [0, 0, 4, 4])]),
    ]


def test_every_label_of_every_record_is_a_target(written: tuple[Path, Folder]) -> None:
    root, folder = written
    data = load(root)
    assert data.classes == folder.classes == ("station0", "station1", "station2")
    assert data.train.targets.tolist() == multi_hot(folder.train, folder.classes)
    assert data.validation.targets.tolist() == multi_hot(folder.test, folder.classes)
    assert not data.tests
    # station1 is never the first label of a frame; frames without a logo are rows of zeros.
    assert data.train.targets[:, 1].sum() > 0
    assert set(data.train.targets.sum(1).tolist()) == {0, 1, 2}


def test_images_are_the_frames_resized(written: tuple[Path, Folder]) -> None:
    root, folder = written
    data = load(root)
    for index in (0, len(folder.train) - 1):
        image, target = data.train[index]
        with Image.open(root / folder.train[index].img_path) as frame:
            resized = np.asarray(frame.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR))
        assert image.shape == (3, *SIZE)
        assert image.is_contiguous()
        # The decoder's own halving differs from the resampling filter along edges.
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - resized)
        assert difference.mean() < 3
        assert target.tolist() == data.train.targets[index].tolist()
    # station0 is red, at [40, 30, 150, 90] of 720x400: red, green, blue left of its number.
    red, green, blue = data.train[0][0][:, 9, 9].tolist()
    assert red > 200
    assert green < 80
    assert blue < 80


def test_splits_go_through_a_data_loader(written: tuple[Path, Folder]) -> None:
    root, folder = written
    data = load(root)
    split = pickle.loads(pickle.dumps(data.train))
    seen = [target for _, targets in DataLoader(split, batch_size=4, num_workers=1) for target in targets.tolist()]
    assert seen == multi_hot(folder.train, folder.classes)


def test_damage_is_counted_named_and_left_out(tmp_path: Path) -> None:
    folder = rs_folder.write(tmp_path, classes=2, frames=12, missing=4, truncated=1, unknown=2)
    data, message = load_with_warning(tmp_path)
    gone = {*folder.missing, *folder.truncated, *folder.unknown}
    assert len(gone) == 7
    kept = [record for record in folder.train if record.img_path not in gone]
    assert data.train.targets.tolist() == multi_hot(kept, folder.classes)
    assert f"{len(kept) + len(folder.test)} frames can be used" in message
    missing = ", ".join(repr(path) for path in folder.missing[:3])
    assert f"missing images: 4 ({missing}, …" in message
    assert f"damaged images: 1 ('{folder.truncated[0]}'" in message
    assert "labels that labels.pkl does not name: 2 ('unlisted')\n" in message
    assert f"frames with unknown labels only: 2 ('{folder.unknown[0]}'" in message
    assert [data.train[index][1].tolist() for index in range(len(kept))] == (data.train.targets.tolist())


@pytest.mark.parametrize("kept", [1, 100, 20_000])
def test_images_cut_anywhere_are_found_at_the_start(tmp_path: Path, kept: int) -> None:
    folder = rs_folder.write(tmp_path, classes=1, frames=3)
    victim = tmp_path / folder.train[0].img_path
    data = victim.read_bytes()
    assert len(data) > kept + 500
    victim.write_bytes(data[:kept])
    _, message = load_with_warning(tmp_path)
    assert f"damaged images: 1 ('{folder.train[0].img_path}'" in message


def test_a_known_label_beside_an_unknown_one_counts(tmp_path: Path) -> None:
    unknown = Label("new", [0, 0, 4, 4])
    both = Record("1-c/f/2.jpg", [unknown, Label("b", [0, 0, 4, 4])])
    small_folder(tmp_path, [*everything(), both])
    data, message = load_with_warning(tmp_path)
    assert data.train.targets.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert "labels that labels.pkl does not name: 1 ('new'" in message
    assert "unknown labels only" not in message


def test_a_class_that_no_training_frame_shows_is_named(tmp_path: Path) -> None:
    small_folder(tmp_path, everything()[:1])
    assert "classes without a training frame: 1 ('b'" in load_with_warning(tmp_path)[1]


def test_repeated_frames_and_unused_folders_are_left_out(tmp_path: Path) -> None:
    extra = [
        Record("1-c/f/a.jpg", [Label("b", [0, 0, 4, 4])]),
        Record("1-c/not_categorized/x.jpg", [Label("a", [0, 0, 4, 4])]),
    ]
    small_folder(tmp_path, [*everything(), *extra])
    data, message = load_with_warning(tmp_path)
    assert data.train.targets.tolist() == [[1, 0], [0, 1]]
    assert "frames listed twice: 1 ('1-c/f/a.jpg'" in message
    assert "frames in folders that are not used: 1 ('1-c/not_categorized/x.jpg'" in message


def test_a_frame_of_both_parts_stays_in_training(tmp_path: Path) -> None:
    small_folder(tmp_path, [*everything(), Record("1-c/test/t.jpg", [])])
    with pytest.raises(DataError, match="none of the 0 frames of 'test'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd.jpg", "is absolute"),
        ("C:/frame.jpg", "is absolute"),
        ("c:frame.jpg", "is absolute"),
        ("../outside.jpg", "contains '..'"),
        ("1-c/../../outside.jpg", "contains '..'"),
        ("1-c/f/..", "contains '..'"),
        ("1-c\\..\\outside.jpg", "backslash"),
        ("1-c/a\0.jpg", "NUL"),
        ("", "is empty"),
        ("1-c//a.jpg", "empty part"),
        ("1-c/f/", "empty part"),
        ("./a.jpg", "empty part or '.'"),
        ("1-c/\ud800.jpg", "not valid text"),
        ("1-c/" + "x" * 1021, "longer than 1024"),
    ],
)
def test_a_path_that_may_lead_outside_is_refused(tmp_path: Path, path: str, message: str) -> None:
    small_folder(tmp_path, everything())
    (tmp_path.parent / "outside.jpg").write_bytes((tmp_path / "1-c/f/a.jpg").read_bytes())
    records = [*everything(), Record(path, [])]
    rs_folder.dump(tmp_path / "master.pkl", {"train": everything(), "test": records})
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "master.pkl") in str(caught.value)
    str(caught.value).encode()


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    root = tmp_path / "data"
    small_folder(root, everything())
    linked = root / "1-c/f/b.jpg"
    linked.unlink()
    linked.symlink_to("a.jpg")
    assert len(load(root).train) == 2
    linked.unlink()
    (tmp_path / "outside.jpg").write_bytes((root / "1-c/f/a.jpg").read_bytes())
    linked.symlink_to("../../../outside.jpg")
    with pytest.raises(DataError, match=r"'1-c/f/b.jpg' leads out of the data folder"):
        load(root)


def jpeg_of_claimed_size(path: Path, width: int, height: int) -> None:
    Image.new("RGB", (16, 8)).save(path, "JPEG")
    data = bytearray(path.read_bytes())
    frame_header = data.index(b"\xff\xc0")
    data[frame_header + 5 : frame_header + 9] = struct.pack(">HH", height, width)
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_cannot_be_frames_are_left_out(tmp_path: Path) -> None:
    names = ["huge", "large", "text", "png", "pipe", "folder"]
    small_folder(tmp_path, [*everything(), *(Record(f"1-c/f/{name}.jpg", []) for name in names)])
    leaf = tmp_path / "1-c/f"
    jpeg_of_claimed_size(leaf / "huge.jpg", 65000, 65000)
    jpeg_of_claimed_size(leaf / "large.jpg", 8000, 5000)
    (leaf / "text.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    Image.new("RGB", (16, 8)).save(leaf / "png.jpg", "PNG")
    (leaf / "pipe.jpg").unlink()
    os.mkfifo(leaf / "pipe.jpg")
    (leaf / "folder.jpg").unlink()
    (leaf / "folder.jpg").mkdir()
    data, message = load_with_warning(tmp_path)
    assert len(data.train) == 2
    assert "damaged images: 4 ('1-c/f/huge.jpg', '1-c/f/large.jpg', '1-c/f/text.jpg', …" in message
    assert "missing images: 2 ('1-c/f/pipe.jpg', '1-c/f/folder.jpg'" in message


def test_a_grey_frame_becomes_rgb(tmp_path: Path) -> None:
    small_folder(tmp_path, everything())
    Image.new("L", (16, 8), 77).save(tmp_path / "1-c/f/a.jpg")
    image, _ = load(tmp_path).train[0]
    assert set(image.flatten().tolist()) == {77}
    assert image.shape == (3, *SIZE)


def test_the_fast_decoding_keeps_detail(tmp_path: Path) -> None:
    small_folder(tmp_path, everything())
    stripes = np.zeros((400, 720), np.uint8)
    stripes[:, np.arange(720) // 4 % 2 == 0] = 255
    Image.fromarray(stripes).save(tmp_path / "1-c/f/a.jpg", quality=95)
    image, _ = rs.load(tmp_path, size=(200, 360), progress=False).train[0]
    # Stripes two pixels wide: decoded at less than this size they would run into grey.
    assert image.float().std() > 100


def test_a_frame_that_vanishes_later_is_named(tmp_path: Path) -> None:
    small_folder(tmp_path, everything())
    data = load(tmp_path)
    (tmp_path / "1-c/f/b.jpg").unlink()
    with pytest.raises(DataError, match=r"1-c/f/b.jpg: was readable when training started"):
        data.train[1]


def test_indices_beyond_the_end_stop_iteration(tmp_path: Path) -> None:
    small_folder(tmp_path, everything())
    assert len(list(load(tmp_path).train)) == 2  # type: ignore[call-overload]


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: does not exist; give the folder"):
        load(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: is not a folder"):
        load(tmp_path / "file")
    with pytest.raises(DataError, match="no frames found; expected master"):
        load(tmp_path)
    rs_folder.dump(tmp_path / "master.pkl", {"train": everything(), "test": []})
    with pytest.raises(DataError, match=r"(?s)none of the 2 frames of 'train'.*missing images: 2"):
        load(tmp_path)


def test_without_labels_classes_are_the_sorted_names(tmp_path: Path) -> None:
    small_folder(tmp_path, everything()[::-1])
    (tmp_path / "labels.pkl").unlink()
    data = load(tmp_path)
    assert data.classes == ("a", "b")
    assert data.train.targets.tolist() == [[0, 1], [1, 0]]
    rs_folder.dump(tmp_path / "master.pkl", {"train": [], "test": [Record("1-c/f/a.jpg", [])]})
    with pytest.raises(DataError, match="no frame has a label"):
        load(tmp_path)

"""The default data as `logos.load` gives it: splits, cache, interruption, and its command line."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import logos
from logos import DataError, LogoData, augment, brands, generated, icons
from logos.__main__ import main

SMALL: dict[str, Any] = {"size": 16, "classes": 3, "images_per_class": 20}
REPOSITORY = Path(__file__).parents[2]


def load(cache: Path, *, workers: int = 1, **changes: int) -> LogoData:
    wanted = {**SMALL, **changes}
    return logos.load(cache_dir=cache, workers=workers, progress=False, **wanted)


def content(data: LogoData) -> dict[str, NDArray[np.uint8]]:
    splits = {"train": data.train, "validation": data.validation, **data.tests}
    return {
        **{f"{name} targets": split.targets for name, split in splits.items()},
        **{
            name: torch.stack([split[index][0] for index in range(len(split))]).numpy()
            for name, split in splits.items()
        },
    }


def assert_same(first: LogoData, second: LogoData) -> None:
    a, b = content(first), content(second)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def no_drawing(*_: object, **__: object) -> NoReturn:
    raise AssertionError("an image is drawn")


def die(*_: object) -> NoReturn:
    os._exit(3)


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    load(path)
    return path


@pytest.fixture
def made(cache: Path) -> LogoData:
    return load(cache)


def test_splits_have_their_images(made: LogoData) -> None:
    assert made.classes == ("pixelfed", "odysee", "safari")
    assert list(made.tests) == ["other artist"]
    sizes = [len(made.train), len(made.validation), len(made.tests["other artist"])]
    assert sizes == [60, 6, 12]
    image, target = made.train[7]
    expected = augment.draw(generated.request(seed=0, **SMALL).plans()[0].marks, size=16, seed=0, split=0, index=7)
    np.testing.assert_array_equal(image.numpy(), expected.image)
    assert target.dtype == torch.float32
    np.testing.assert_array_equal(target.numpy(), expected.target)
    np.testing.assert_array_equal(made.train.targets[7], expected.target)


def test_other_artist_draws_the_same_brands_in_the_same_colours() -> None:
    train, validation, other = generated.request(seed=0, **{**SMALL, "classes": 40}).plans()
    assert train.marks == validation.marks
    assert {mark.pack for mark in other.marks} == {icons.FONT_AWESOME}
    assert [mark.colour for mark in other.marks] == [mark.colour for mark in train.marks]
    assert len({train.number, validation.number, other.number}) == 3


def test_second_run_draws_nothing(cache: Path, made: LogoData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "draw", no_drawing)
    assert_same(load(cache), made)


@pytest.mark.parametrize("change", [{"size": 20}, {"seed": 1}, {"classes": 4}])
def test_other_parameters_are_other_data(cache: Path, change: dict[str, int]) -> None:
    before = set(folders(cache))
    load(cache, **change)
    assert len(set(folders(cache)) - before) == 1


def test_fewer_images_are_the_first_of_more(tmp_path: Path, made: LogoData) -> None:
    fewer = load(tmp_path, images_per_class=10)
    np.testing.assert_array_equal(content(fewer)["train"], content(made)["train"][:30])


def test_processes_make_the_same_images(tmp_path: Path) -> None:
    assert 2 * generated.CHUNK < 3 * 70
    single = load(tmp_path / "single", images_per_class=70)
    assert_same(load(tmp_path / "several", images_per_class=70, workers=2), single)


def test_a_split_is_pickled_as_its_path(made: LogoData) -> None:
    pickled = pickle.dumps(made.train)
    assert len(pickled) < 2_000
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(copy[5][0], made.train[5][0])


def test_items_are_copies(made: LogoData) -> None:
    image, target = made.train[0]
    image.zero_()
    target.fill_(7)
    assert made.train[0][0].any()
    assert made.train[0][1].max() <= 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "float", "another shape"])
@pytest.mark.parametrize("name", ["train_images.npy", "other_artist_targets.npy"])
def test_spoilt_cache_is_made_anew(tmp_path: Path, made: LogoData, name: str, damage: str) -> None:
    load(tmp_path)
    (folder,) = folders(tmp_path)
    file = folder / name
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "float":
        np.save(file, np.load(file).astype(np.float32))
    else:
        np.save(file, np.load(file)[:-1])
    assert_same(load(tmp_path), made)
    assert folders(tmp_path) == [folder]


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return open, (str(self.path), "w")  # type: ignore[return-value]


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickle_in_the_cache_is_not_executed(tmp_path: Path, made: LogoData, wrapped: bool) -> None:
    load(tmp_path)
    (folder,) = folders(tmp_path)
    trap = tmp_path / "executed"
    file = folder / "train_targets.npy"
    if wrapped:
        np.save(file, np.array([Payload(trap)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Payload(trap)))
    assert_same(load(tmp_path), made)
    assert not trap.exists()


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = generated._draw_chunk

    def interrupted(
        plan: generated.Plan, start: int, size: int, seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if plan.name == "validation":
            raise KeyboardInterrupt
        return draw(plan, start, size, seed)

    monkeypatch.setattr(generated, "_draw_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert folders(tmp_path) == []


def test_kill_leaves_no_cache_and_the_next_run_cleans_up(tmp_path: Path, made: LogoData) -> None:
    script = (
        "import os, signal, logos\n"
        "from logos import generated\n"
        "draw = generated._draw_chunk\n"
        "def killed(plan, *rest):\n"
        "    if plan.name == 'validation':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(plan, *rest)\n"
        "generated._draw_chunk = killed\n"
        "logos.load(size=16, classes=3, images_per_class=20, workers=1, progress=False)\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=environment)
    assert run.returncode == -signal.SIGKILL
    home = tmp_path / "caps_kernels" / "logos"
    assert [".draft-" in path.name for path in folders(home)] == [True]
    assert_same(load(home), made)
    assert [".draft-" in path.name for path in folders(home)] == [False]


@pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="the system does not list children")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = "import logos; logos.load(images_per_class=5000, workers=2, progress=False)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, env=environment)
    try:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        within(30, lambda: len(children.read_text().split()) >= 2)
        workers = children.read_text().split()
    finally:
        run.kill()
        run.wait()
    within(30, lambda: not any(running(process) for process in workers))


def running(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dead_worker_is_an_error_and_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_draw_chunk", die)
    with pytest.raises(DataError, match=r"died.*__main__.*workers=1"):
        load(tmp_path, workers=2)
    assert folders(tmp_path) == []


def test_two_runs_at_once_generate_once(tmp_path: Path, made: LogoData, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, both = generated._draw_chunk, threading.Barrier(2)
    chunks, results = [], []

    def counted(plan: generated.Plan, start: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        chunks.append(plan.name)
        return draw(plan, start, size, seed)

    def run() -> None:
        both.wait()
        results.append(load(tmp_path))

    monkeypatch.setattr(generated, "_draw_chunk", counted)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chunks) == ["other_artist", "train", "validation"]
    assert len(results) == 2
    for result in results:
        assert_same(result, made)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("pictures", {}, r'unknown data \'pictures\': give "icons" or "rs:PATH"'),
        ("rs:", {}, "unknown data"),
        ("icons:x", {}, "unknown data"),
        ("rs:x", {"classes": 5}, "classes and images_per_class belong to icons"),
        ("rs:x", {"images_per_class": 5}, "classes and images_per_class belong to icons"),
        ("icons", {"size": (64, 32)}, "square, not 64x32"),
        ("icons", {"size": 15}, "size is 16 or more for icons, not 15"),
        ("icons", {"classes": 0}, "2 to 205 classes, not 0"),
        ("icons", {"images_per_class": 0}, "images_per_class is 1 or more for icons, not 0"),
        ("icons", {"seed": -1}, "seed is 0 or more for icons, not -1"),
        ("icons", {"workers": 0}, "workers is 1 or more for icons, not 0"),
    ],
)
def test_wrong_argument_is_named(tmp_path: Path, spec: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        logos.load(spec, cache_dir=tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_unusable_cache_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept in .*file.*cache_dir"):
        load(tmp_path / "file")


def test_rs_goes_to_its_reader(monkeypatch: pytest.MonkeyPatch, made: LogoData) -> None:
    from logos import rs

    asked = []

    def reader(path: Path, *, size: tuple[int, int], progress: bool) -> LogoData:
        asked.append((path, size, progress))
        return made

    monkeypatch.setattr(rs, "load", reader)
    assert logos.load("rs:C:/data", size=28) is made
    assert logos.load("rs:frames", size=(100, 180), progress=False) is made
    assert asked == [(Path("C:/data"), (28, 28), True), (Path("frames"), (100, 180), False)]


def test_command_line_draws_a_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda _, xy, text, *rest, **options: captions.append(text),
    )
    file = tmp_path / "sheet.png"
    assert main(["--sheet", str(file), "--classes", "12", "--size", "16"]) == 0
    assert str(file) in capsys.readouterr().out
    page = np.asarray(Image.open(file).convert("RGB"))
    assert page.shape[1] == 2 * 24 + 10 * 128 + 9 * 10
    names = {brand.slug for brand in brands.choose(12, 0)}
    shown = {name for caption in captions for name in caption.split(" +\n")}
    assert shown == {*names, "no logo"}
    assert any("+" in caption for caption in captions)
    first = augment.draw(
        generated.request(size=16, classes=12, images_per_class=1, seed=0).plans()[0].marks,
        size=16,
        seed=0,
        split=0,
        index=0,
    )
    np.testing.assert_array_equal(page[68:196:8, 24:152:8], first.image.transpose(1, 2, 0))


def test_command_line_tells_what_it_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(generated, "default_cache_dir", lambda: cache)
    assert main(["--size", "16", "--classes", "3", "--images-per-class", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 brands: pixelfed, odysee, safari"
    targets = load(cache).train.targets.sum(axis=1)
    assert lines[2].split() == ["train", "60", *(str((targets == k).sum()) for k in range(3))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--classes 9999", "2 to 205 classes, not 9999"),
        ("--sheet /no/such/folder/x.png", "x.png cannot be written"),
        ("--sheet x.nonsense", "unknown file extension"),
    ],
)
def test_command_line_refuses_clearly(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(arguments.split()) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("logos: ")
    assert message in printed.err

"""One generated image: what it depends on, where its logos lie, and that they can be seen."""

from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray

from logos import augment, backgrounds, generated, icons

SIZE = 32
MARKS = generated.request(size=SIZE, classes=5, images_per_class=1, seed=0).plans()[0].marks


def draw(index: int, *, size: int = SIZE, seed: int = 0, split: int = 0) -> augment.Sample:
    return augment.draw(MARKS, size=size, seed=seed, split=split, index=index)


@lru_cache(maxsize=1)
def many() -> list[augment.Sample]:
    return [draw(index) for index in range(2000)]


def test_recipe_is_the_agreed_one() -> None:
    # Fixed once for all: results on other numbers do not compare.
    assert (augment.NO_LOGO, augment.TWO_LOGOS) == (0.15, 0.15)
    assert (augment.PERSPECTIVE_P, augment.PERSPECTIVE) == (0.7, 0.12)
    assert (augment.ROTATION_DEGREES, augment.SCALE) == (15.0, (0.45, 0.95))
    assert (augment.RECOLOUR_P, augment.SATURATION_P) == (0.35, 0.30)
    assert (augment.BLUR_P, augment.GAIN, augment.NOISE_SIGMA) == (0.3, (0.7, 1.15), (0.0, 12.0))
    assert (augment.JPEG_P, augment.JPEG_QUALITY) == (0.5, (35, 90))
    assert (generated.CLASSES, generated.IMAGES_PER_CLASS) == (20, 500)


def test_image_does_not_depend_on_what_was_drawn_before() -> None:
    forwards = [draw(index) for index in range(12)]
    for cache in (icons.mask, augment._reduced, augment._outline):
        cache.cache_clear()
    backwards = [draw(index) for index in reversed(range(12))][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.target, second.target)


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": 1}])
def test_seeds_and_splits_have_nothing_in_common(other: dict[str, int]) -> None:
    same = [np.array_equal(draw(index).image, draw(index, **other).image) for index in range(20)]
    assert not any(same)


def test_image_is_colour_and_of_the_size_asked_for() -> None:
    sample = draw(3, size=48)
    assert sample.image.dtype == np.uint8
    assert sample.image.shape == (3, 48, 48)
    assert any(np.ptp(draw(i).image.mean(axis=(1, 2))) > 20 for i in range(5))


def test_number_of_logos_follows_the_recipe() -> None:
    counts = np.bincount([len(sample.boxes) for sample in many()], minlength=3) / len(many())
    # Four standard deviations of 2,000 draws.
    np.testing.assert_allclose(counts, [0.15, 0.70, 0.15], atol=0.04)


def test_backgrounds_come_equally_often() -> None:
    kinds, counts = np.unique([sample.background for sample in many()], return_counts=True)
    assert set(kinds) == set(backgrounds.KINDS)
    np.testing.assert_allclose(counts / len(many()), 0.25, atol=0.04)


def test_target_names_the_logos_drawn() -> None:
    for index, sample in enumerate(many()):
        classes = [number for number, _ in sample.boxes]
        assert sorted(classes) == np.flatnonzero(sample.target).tolist()
        assert not classes or classes[0] == index % len(MARKS)
    seconds = {s.boxes[1][0] - s.boxes[0][0] for s in many() if len(s.boxes) == 2}
    assert seconds == {-4, -3, -2, -1, 1, 2, 3, 4}


def test_logos_lie_in_the_frame_at_any_place() -> None:
    centres = []
    for sample in many():
        for _, (left, top, right, bottom) in sample.boxes:
            for low, high in ((left, right), (top, bottom)):
                inside = low >= -1e-6 and high <= SIZE + 1e-6
                covers = low <= 1e-6 and high >= SIZE - 1e-6
                assert inside or covers
            centres.append(((left + right) / 2 / SIZE, (top + bottom) / 2 / SIZE))
    quartiles = np.quantile(centres, [0.02, 0.5, 0.98], axis=0)
    assert (quartiles[0] < 0.32).all()
    np.testing.assert_allclose(quartiles[1], 0.5, atol=0.03)
    assert (quartiles[2] > 0.68).all()


def test_boxes_are_where_the_logos_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[NDArray[np.float32]] = []
    render = augment._render

    def spy(*arguments: object) -> NDArray[np.float32]:
        drawn.append(render(*arguments))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(augment, "_render", spy)
    for index in range(60):
        drawn.clear()
        sample = draw(index, size=64)
        for alpha, (_, box) in zip(drawn, sample.boxes, strict=True):
            rows, columns = np.nonzero(alpha > 0.25)
            seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            np.testing.assert_allclose(seen, np.clip(box, 0, 64), atol=1.6)


def test_scale_fills_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "PERSPECTIVE_P", 0.0)
    monkeypatch.setattr(augment, "ROTATION_DEGREES", 0.0)
    sides: dict[int, list[float]] = {1: [], 2: []}
    for index in range(600):
        boxes = draw(index).boxes
        for _, (left, top, right, bottom) in boxes:
            sides[len(boxes)].append(max(right - left, bottom - top) / SIZE)
    # The box is that of pixels half covered or more, a hair smaller than the mark.
    for count, (least, most) in ((1, augment.SCALE), (2, augment.PAIR_SCALE)):
        assert least - 0.01 < min(sides[count]) < least + 0.02
        assert most - 0.02 < max(sides[count]) <= most


def test_two_logos_hardly_cover_each_other() -> None:
    shared = []
    for sample in many():
        if len(sample.boxes) == 2:
            a, b = (np.reshape(box, (2, 2)) for _, box in sample.boxes)
            common = np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None))
            shared.append(common / min(np.prod(a[1] - a[0]), np.prod(b[1] - b[0])))
    # Placed blindly, half of the pairs share almost half of a box or more, and some a whole one.
    assert np.quantile(shared, 0.6) <= augment.PAIR_OVERLAP
    assert np.quantile(shared, 0.95) < 0.4
    assert max(shared) < 0.75


def test_homography_takes_corners_to_corners() -> None:
    source = np.array([[0, 0], [4, 0], [4, 2], [0, 2]], np.float64)
    target = np.array([[1, 1], [9, 2], [8, 7], [0, 6]], np.float64)
    matrix = augment._homography(source, target)
    np.testing.assert_allclose(augment._project(matrix, source), target, atol=1e-9)
    # A perspective map keeps lines: the crossing of the diagonals goes to the crossing.
    np.testing.assert_allclose(augment._project(matrix, np.array([[2.0, 1.0]]))[0], [160 / 36, 142 / 36], atol=0.2)


def guarded(
    surroundings: float | list[float], colour: float, coverage: float = 1.0
) -> tuple[NDArray[np.float32], bool]:
    grey = np.repeat(np.reshape(np.asarray(surroundings, np.float32), (-1, 1)), 3, axis=1)
    return augment._guarded(grey, np.full((2, 2), coverage, np.float32), np.full(3, colour, np.float32))


def test_guard_leaves_a_colour_that_shows() -> None:
    colour, visible = guarded(50, 50 + augment.CONTRAST + 1)
    assert visible
    np.testing.assert_array_equal(colour, 50 + augment.CONTRAST + 1)


@pytest.mark.parametrize("background", [0, 50, 128, 200, 255])
def test_guard_moves_a_colour_that_drowns(background: float) -> None:
    colour, visible = guarded(background, background)
    assert visible
    assert abs(colour - background).min() >= augment.CONTRAST


def test_guard_asks_more_of_thin_marks() -> None:
    thick, _ = guarded(0, 80, coverage=1.0)
    thin, visible = guarded(0, 80, coverage=0.5)
    assert visible
    np.testing.assert_array_equal(thick, 80)
    assert 0.5 * thin.min() >= augment.CONTRAST


def test_guard_knows_when_no_colour_shows() -> None:
    # Half black, half white, and grey in between is hidden too: every colour drowns somewhere.
    assert not guarded([0, 0, 64, 128, 128, 192, 255, 255], 128, coverage=0.5)[1]


def test_halo_makes_a_mark_visible_on_the_busiest_background() -> None:
    rng = np.random.default_rng(0)
    canvas = np.repeat(rng.choice([0, 64, 128, 192, 255], (64, 64, 1)), 3, axis=2)
    alpha = np.zeros((64, 64), np.float32)
    alpha[20:44:4, 16:48] = 0.8
    colour = (128, 128, 128)
    composed = augment._compose(canvas.astype(np.float32), alpha, colour).mean(axis=2)
    strokes, beside = composed[20:44:4, 20:44], composed[21:45:4, 20:44]
    assert abs(strokes.mean() - beside.mean()) > augment.CONTRAST / 2
    assert beside.std() < 0.6 * canvas.std()


def test_every_logo_changes_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_camera", lambda _, canvas: np.rint(canvas).astype(np.uint8))
    compose, differences = augment._compose, []

    def spy(canvas: NDArray[np.float32], alpha: NDArray[np.float32], colour: backgrounds.Colour) -> NDArray[np.float32]:
        composed = compose(canvas, alpha, colour)
        change = np.sqrt((composed - canvas) ** 2 @ augment.EYE)
        differences.append(float(np.median(change[alpha > 0.5])))
        return composed

    monkeypatch.setattr(augment, "_compose", spy)
    for index in range(300):
        draw(index, size=64)
    assert len(differences) > 250
    assert min(differences) > augment.CONTRAST / 2


@pytest.mark.parametrize("kind", backgrounds.KINDS)
def test_background_is_as_its_kind_says(kind: str) -> None:
    painted = [backgrounds.paint(kind, np.random.default_rng(seed), 64) for seed in range(8)]
    for canvas in painted:
        assert canvas.shape == (64, 64, 3)
        assert 0 <= canvas.min() <= canvas.max() <= 255
        steps = np.abs(np.diff(canvas, axis=0)).max(axis=2)
        if kind == "flat":
            assert np.ptp(canvas, axis=(0, 1)).max() == 0
        elif kind == "gradient":
            assert np.ptp(canvas, axis=(0, 1)).max() > 5
            assert steps.max() < 12
        elif kind == "noise":
            assert canvas.std(axis=(0, 1)).min() > 5
        else:
            edges = (steps > 12).mean()
            assert 0.005 < edges < 0.4
    means = np.array([canvas.mean(axis=(0, 1)) for canvas in painted])
    assert means.std(axis=0).min() > 20


def test_camera_without_its_chances_only_scales_and_adds_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("BLUR_P", "JPEG_P"):
        monkeypatch.setattr(augment, name, 0.0)
    monkeypatch.setattr(augment, "NOISE_SIGMA", (5.0, 5.0))
    monkeypatch.setattr(augment, "GAIN", (0.8, 0.8))
    canvas = np.full((64, 64, 3), 100, np.float32)
    seen = augment._camera(np.random.default_rng(0), canvas).astype(float)
    assert seen.mean() == pytest.approx(80, abs=0.3)
    assert seen.std() == pytest.approx(5, abs=0.3)


def test_reduced_masks_stay_in_place() -> None:
    # 256 pixels reduced by 17 are 16, the last of which stands for one pixel: nothing may stretch.
    mark = MARKS[0]
    mask = np.asarray(icons.mask(mark.pack, mark.slug), np.float64)
    shrink = 17.2 * augment.SUPERSAMPLING
    width, height = mask.shape[1] / shrink, mask.shape[0] / shrink
    quad = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    alpha = augment._render(mark, augment._Shape(quad, quad[0], quad[2]), np.zeros(2), 16)
    assert max(mask.shape) == 256
    assert alpha.sum() == pytest.approx(mask.sum() / 255 / shrink**2, rel=0.03)
    np.testing.assert_allclose(centre_of_mass(alpha), centre_of_mass(mask) / shrink, atol=0.06)


def centre_of_mass(weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """(x, y), in pixels from the outer corner of the first one."""
    y, x = np.indices(weights.shape) + 0.5
    total = weights.sum()
    return np.array([(x * weights).sum() / total, (y * weights).sum() / total])

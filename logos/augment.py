"""One image of the default data, drawn from (seed, split, index) alone.

The recipe, in the order in which an image is made; the constants below are all of its numbers.

1. How many logos: none, one or two. The first is of class `index % classes`, a second of another.
2. A background: flat, gradient, coloured noise or clutter (`logos.backgrounds`).
3. Per logo a shape: scale, perspective, rotation; then a place, wholly inside the frame where the
   shape fits into it. Two logos are drawn smaller and put where they hardly cover each other.
4. Per logo a colour: the brand's own, or recoloured, or with its saturation changed; then the
   contrast guard: a logo that its surroundings would swallow is lightened or darkened, and if no
   colour stands out from them they are calmed by a halo.
5. A camera: blur, gain, noise, JPEG.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from logos import backgrounds, icons
from logos.backgrounds import Colour

VERSION = 1
"""Raised with every change to the images; caches of other versions are not read."""

NO_LOGO = 0.15
TWO_LOGOS = 0.15

SCALE = (0.45, 0.95)
"""Longer side of the mark over the side of the image, before perspective and rotation."""
PAIR_SCALE = (0.45, 0.60)
"""The same for two logos: the part of the range in which both have room."""
PAIR_OVERLAP = 0.10
"""The share of the smaller box that two logos may have in common, and how often to try for it."""
PAIR_TRIES = 40
PERSPECTIVE_P = 0.7
PERSPECTIVE = 0.12
"""Each corner moves by up to this share of the mark's width and height."""
ROTATION_DEGREES = 15.0
"""Standard deviation."""

RECOLOUR_P = 0.35
SATURATION_P = 0.30
SATURATION = (0.3, 1.5)
CONTRAST = 70.0
"""Grey levels by which a mark, averaged over its coverage, must differ from its surroundings."""
CONTRAST_QUANTILE = 0.2
"""… from this share of the surroundings at least, so that no half of a mark drowns."""
GUARD_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far towards white or black the guard may take a colour, tried in this order."""
HALO_OPACITY = 0.85

BLUR_P = 0.3
BLUR_RADIUS = (0.3, 1.0)
"""In pixels of a 64-pixel image, and in proportion at other sizes."""
GAIN = (0.7, 1.15)
NOISE_SIGMA = (0.0, 12.0)
JPEG_P = 0.5
JPEG_QUALITY = (35, 90)

SUPERSAMPLING = 2
EYE = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the distance between two colours: those of brightness."""


@dataclass(frozen=True)
class Mark:
    """What a class looks like: an icon of a pack and the brand's colour."""

    pack: str
    slug: str
    colour: Colour


@dataclass(frozen=True)
class Sample:
    """An image, what is on it, and how it came about."""

    image: NDArray[np.uint8]
    """RGB [3, size, size]."""
    target: NDArray[np.uint8]
    """[classes], 1 where the logo is on the image."""
    background: str
    boxes: tuple[tuple[int, tuple[float, float, float, float]], ...]
    """(class, (left, top, right, bottom) in pixels) of each logo, the first one first."""


@dataclass(frozen=True)
class _Shape:
    """A mark brought to its size and turned, around the origin."""

    quad: NDArray[np.float64]
    """[4, 2] where the corners of its box come to lie, clockwise from the top left."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """[2] and [2]: the bounding box of what is drawn, tighter than that of the corners."""


def draw(marks: Sequence[Mark], *, size: int, seed: int, split: int, index: int) -> Sample:
    """Draws one image.

    Args:
        marks: The classes, in the order of the target's columns.
        size: Pixels along a side.
        seed: Seed of the data set.
        split: Number of the split; splits with different numbers have nothing in common.
        index: Number of the image within the split.

    Returns:
        The sample; the same for the same arguments, whatever was drawn before.
    """
    rng = np.random.default_rng([seed, split, index])
    chosen = _choose_classes(rng, index % len(marks), len(marks))
    background = backgrounds.KINDS[rng.integers(len(backgrounds.KINDS))]
    canvas = backgrounds.paint(background, rng, size)
    shapes = [_shape(rng, marks[c], size, PAIR_SCALE if len(chosen) > 1 else SCALE) for c in chosen]
    places = _places(rng, shapes, size)
    for number, shape, place in zip(chosen, shapes, places, strict=True):
        alpha = _render(marks[number], shape, place, size)
        colour = _vary(rng, marks[number].colour)
        canvas = _compose(canvas, alpha, colour)
    target = np.zeros(len(marks), np.uint8)
    target[chosen] = 1
    boxes = tuple(
        (number, (*(shape.low + place).tolist(), *(shape.high + place).tolist()))
        for number, shape, place in zip(chosen, shapes, places, strict=True)
    )
    return Sample(_camera(rng, canvas).transpose(2, 0, 1).copy(), target, background, boxes)


def _choose_classes(rng: np.random.Generator, first: int, classes: int) -> list[int]:
    draw_of_count = rng.uniform()
    if draw_of_count < NO_LOGO:
        return []
    if draw_of_count < NO_LOGO + TWO_LOGOS:
        return [first, int(first + rng.integers(1, classes)) % classes]
    return [first]


def _shape(rng: np.random.Generator, mark: Mark, size: int, scale: tuple[float, float]) -> _Shape:
    width, height = icons.mask(mark.pack, mark.slug).size
    side = rng.uniform(*scale) * size
    half = np.array([width, height]) / max(width, height) * side / 2
    quad = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    if rng.uniform() < PERSPECTIVE_P:
        quad += rng.uniform(-PERSPECTIVE, PERSPECTIVE, (4, 2)) * 2 * half
    angle = np.radians(rng.normal(0.0, ROTATION_DEGREES))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    quad = quad @ turn
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    outline = _project(_homography(corners, quad), _outline(mark.pack, mark.slug))
    return _Shape(quad, outline.min(axis=0), outline.max(axis=0))


def _places(rng: np.random.Generator, shapes: Sequence[_Shape], size: int) -> list[NDArray[np.float64]]:
    """Where the origin of each shape goes; of several tries the first with little overlap."""
    best: list[NDArray[np.float64]] = []
    least = np.inf
    for _ in range(PAIR_TRIES if len(shapes) > 1 else 1):
        places = [_place(rng, shape, size) for shape in shapes]
        shared = _shared_area(shapes, places) if len(shapes) > 1 else 0.0
        if shared < least:
            best, least = places, shared
        if least <= PAIR_OVERLAP:
            break
    return best


def _place(rng: np.random.Generator, shape: _Shape, size: int) -> NDArray[np.float64]:
    # Low and high end of the offset swap when the shape is larger than the frame: then it covers
    # the frame's whole width or height, and as little as possible is cut off.
    ends = np.sort(np.stack([-shape.low, size - shape.high]), axis=0)
    return np.asarray(rng.uniform(ends[0], ends[1]))


def _shared_area(shapes: Sequence[_Shape], places: Sequence[NDArray[np.float64]]) -> float:
    """Area common to two bounding boxes, over the area of the smaller one."""
    lows, highs = (
        np.stack([getattr(shape, end) + place for shape, place in zip(shapes, places, strict=True)])
        for end in ("low", "high")
    )
    common = np.prod(np.clip(highs.min(axis=0) - lows.max(axis=0), 0, None))
    return float(common / np.prod(highs - lows, axis=1).min())


def _render(mark: Mark, shape: _Shape, place: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Coverage of the placed mark, float32 [size, size] in 0..1."""
    fine = size * SUPERSAMPLING
    quad = (shape.quad + place) * SUPERSAMPLING
    drawn_side = max(np.ptp(quad, axis=0))
    whole = icons.mask(mark.pack, mark.slug)
    factor = max(1, int(max(whole.size) / drawn_side))
    # The last row and column of a reduced mask may stand for less than `factor` pixels.
    width, height = (side / factor for side in whole.size)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    back = _homography(quad, corners)
    warped = _reduced(mark.pack, mark.slug, factor).transform(
        (fine, fine),
        Image.Transform.PERSPECTIVE,
        (back / back[2, 2]).ravel()[:8].tolist(),
        Image.Resampling.BICUBIC,
    )
    coverage: NDArray[np.float32] = np.array(warped.reduce(SUPERSAMPLING), np.float32)
    coverage /= 255
    return coverage


@lru_cache(maxsize=4096)
def _reduced(pack: str, slug: str, factor: int) -> Image.Image:
    """A mask shrunk by a whole factor, so that sampling it at its drawn size does not alias."""
    return icons.mask(pack, slug).reduce(factor)


@lru_cache(maxsize=1024)
def _outline(pack: str, slug: str) -> NDArray[np.float64]:
    """[64, 2] the outermost points (x, y) of a mask in 64 directions: its convex hull, nearly."""
    rows, columns = np.nonzero(np.asarray(icons.mask(pack, slug)) > 127)
    points = np.stack([columns + 0.5, rows + 0.5], axis=1)
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    outermost: NDArray[np.float64] = points[(points @ directions).argmax(axis=0)]
    return outermost


def _homography(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The projective map [3, 3] that takes four points [4, 2] to four others."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    solution = np.linalg.solve(np.array(rows), target.ravel())
    return np.append(solution, 1.0).reshape(3, 3)


def _project(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    mapped = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    projected: NDArray[np.float64] = mapped[:, :2] / mapped[:, 2:]
    return projected


def _vary(rng: np.random.Generator, colour: Colour) -> Colour:
    choice = rng.uniform()
    if choice < RECOLOUR_P:
        return backgrounds.random_colour(rng)
    if choice < RECOLOUR_P + SATURATION_P:
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        saturation = min(1.0, saturation * rng.uniform(*SATURATION))
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)
    return colour


def _compose(canvas: NDArray[np.float32], alpha: NDArray[np.float32], colour: Colour) -> NDArray[np.float32]:
    """Lays a mark over the canvas in a colour that shows there."""
    reach = 2 * max(1, round(len(canvas) / 64)) + 1
    spread = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(reach))
    near = np.asarray(spread) > 64
    paint, visible = _guarded(canvas[near], alpha, np.asarray(colour, np.float32))
    if not visible:
        halo = np.asarray(spread.filter(ImageFilter.GaussianBlur(reach / 3)), np.float32) / 255
        plate = np.full(3, 0.0 if paint @ EYE > 127 else 255.0, np.float32)
        plate += 0.25 * (canvas[near].mean(axis=0) - plate)
        canvas = canvas + (HALO_OPACITY * halo)[..., None] * (plate - canvas)
    return canvas + alpha[..., None] * (paint - canvas)


def _guarded(
    surroundings: NDArray[np.float32], alpha: NDArray[np.float32], colour: NDArray[np.float32]
) -> tuple[NDArray[np.float32], bool]:
    """The colour nearest to the wanted one that shows, and whether even that one does.

    Args:
        surroundings: [N, 3] the canvas under and close around the mark.
        alpha: [size, size] coverage of the mark.
        colour: [3] the wanted colour.
    """
    # A stroke thinner than a pixel covers it in part: what is seen is coverage times difference.
    opacity = float((alpha**2).sum() / max(alpha.sum(), 1e-6))
    candidates = np.stack([colour + step * (end - colour) for step in GUARD_STEPS for end in (0.0, 255.0)])
    squares = (candidates[:, None] - surroundings) ** 2 @ EYE
    seen = opacity * np.sqrt(np.quantile(squares, CONTRAST_QUANTILE, axis=1))
    for pair in range(0, len(candidates), 2):
        best = pair + int(seen[pair : pair + 2].argmax())
        if seen[best] >= CONTRAST:
            return candidates[best], True
    return candidates[int(seen.argmax())], False


def _camera(rng: np.random.Generator, canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What a camera and a codec make of it, uint8 [size, size, 3]."""
    size = len(canvas)
    if rng.uniform() < BLUR_P:
        radius = rng.uniform(*BLUR_RADIUS) * size / 64
        sharp = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        canvas = np.asarray(sharp.filter(ImageFilter.GaussianBlur(radius)), np.float32)
    seen = canvas * rng.uniform(*GAIN)
    seen = seen + rng.normal(0.0, rng.uniform(*NOISE_SIGMA), seen.shape)
    image = np.clip(np.rint(seen), 0, 255).astype(np.uint8)
    if rng.uniform() < JPEG_P:
        quality = int(rng.integers(*JPEG_QUALITY, endpoint=True))
        coded = io.BytesIO()
        Image.fromarray(image).save(coded, "JPEG", quality=quality)
        image = np.asarray(Image.open(coded).convert("RGB"))
    return image

"""The four backgrounds a logo is drawn on, each [size, size, 3] float32 in 0..255."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

KINDS = ("flat", "gradient", "noise", "clutter")
NOISE_GRIDS = (2, 5, 11, 23)
"""Cells along a side of each octave of coloured noise, coarse to fine."""
NOISE_SPREAD = (15.0, 55.0)
"""Standard deviation of the coarsest octave, in grey levels; each finer one has 0.7 of it."""
CLUTTER_SHAPES = (6, 16)
CLUTTER_SUPERSAMPLING = 2

Colour = tuple[int, int, int]


def random_colour(rng: np.random.Generator) -> Colour:
    """A colour of uniform hue, from grey to vivid and from dark to bright."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.0, 0.9), rng.uniform(0.1, 1.0)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def paint(kind: str, rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Paints a background.

    Args:
        kind: One of `KINDS`.
        rng: Source of every choice.
        size: Pixels along a side.

    Returns:
        float32 [size, size, 3], 0..255.
    """
    painters = {"flat": _flat, "gradient": _gradient, "noise": _noise, "clutter": _clutter}
    return np.asarray(np.clip(painters[kind](rng, size), 0, 255), np.float32)


def _flat(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    return np.full((size, size, 3), random_colour(rng), np.float32)


def _gradient(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    start, end = (np.asarray(random_colour(rng), np.float32) for _ in range(2))
    x, y = np.meshgrid(*[np.linspace(-0.5, 0.5, size, dtype=np.float32)] * 2)
    angle = rng.uniform(0, 2 * np.pi)
    if rng.uniform() < 0.5:
        ramp = x * np.cos(angle) + y * np.sin(angle)
    else:
        ramp = np.hypot(x - 0.4 * np.cos(angle), y - 0.4 * np.sin(angle))
    ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return np.asarray(start + ramp[..., None] * (end - start), np.float32)


def _noise(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    canvas = _flat(rng, size)
    spread = rng.uniform(*NOISE_SPREAD)
    for cells in NOISE_GRIDS:
        for channel in range(3):
            grid = Image.fromarray(rng.normal(0.0, spread, (cells, cells)).astype(np.float32))
            canvas[..., channel] += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        spread *= 0.7
    return canvas


def _clutter(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    side = size * CLUTTER_SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), random_colour(rng))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(*CLUTTER_SHAPES, endpoint=True)):
        _clutter_shape(draw, rng, side)
    return np.asarray(canvas.reduce(CLUTTER_SUPERSAMPLING), np.float32)


def _clutter_shape(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    colour = random_colour(rng)
    centre = rng.uniform(0, side, 2)
    radius = rng.uniform(0.05, 0.35, 2) * side
    box = [*(centre - radius), *(centre + radius)]
    width = max(1, round(rng.uniform(0.015, 0.05) * side))
    shape = rng.integers(5)
    if shape == 0:
        draw.rectangle(box, fill=colour)
    elif shape == 1:
        draw.ellipse(box, fill=colour)
    elif shape == 2:
        draw.line(box, fill=colour, width=width)
    elif shape == 3:
        start, end = rng.uniform(0, 360, 2)
        draw.arc(box, start, end, fill=colour, width=width)
    else:
        corners = centre + rng.uniform(-0.3, 0.3, (3, 2)) * side
        draw.polygon([(x, y) for x, y in corners], fill=colour)

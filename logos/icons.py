"""Brand marks from the two icon packs, as alpha masks and brand colours.

`simple-icons-pack` (CC0) draws the marks for training and validation, `fontawesome-free-pack`
(Font Awesome Free, CC-BY-4.0) holds many of the same marks drawn by other artists. Both are wheels
on PyPI that carry the SVG source; `resvg-py` rasterises it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from types import MappingProxyType

import fontawesome_free_pack
import numpy as np
import resvg_py
import simple_icons_pack
from numpy.typing import NDArray
from PIL import Image

from logos.splits import DataError

SIMPLE_ICONS = "simple-icons-pack"
FONT_AWESOME = "fontawesome-free-pack"
RASTER_SIZE = 256
"""Pixels along the longer side of a mask, a few times more than any image needs."""


@dataclass(frozen=True)
class Icon:
    """One mark of a pack."""

    slug: str
    title: str
    svg: str
    colour: tuple[int, int, int] | None
    """The brand's sRGB colour; Font Awesome records none."""
    licence: str | None
    """A licence of the mark's own, different from the pack's; simple-icons names it."""


@lru_cache(maxsize=1)
def simple_icons() -> Mapping[str, Icon]:
    """Every icon of simple-icons-pack by its slug."""
    constants = (getattr(simple_icons_pack, name) for name in dir(simple_icons_pack))
    icons = {
        icon.slug: Icon(icon.slug, icon.title, icon.svg, _rgb(icon.hex), icon.license)
        for icon in constants
        if isinstance(icon, simple_icons_pack.Icon)
    }
    return MappingProxyType(icons)


@lru_cache(maxsize=1)
def font_awesome_brands() -> Mapping[str, Icon]:
    """Every icon of the brands family of fontawesome-free-pack by its slug."""
    constants = (getattr(fontawesome_free_pack, name) for name in dir(fontawesome_free_pack))
    icons = {
        icon.slug: Icon(icon.slug, icon.label, icon.svg, None, None)
        for icon in constants
        if isinstance(icon, fontawesome_free_pack.Icon) and icon.family == "brands"
    }
    return MappingProxyType(icons)


def find(pack: str, slug: str) -> Icon:
    """An icon by pack and slug.

    Raises:
        DataError: The installed pack has no such icon; packs drop brands now and then.
    """
    icons = simple_icons() if pack == SIMPLE_ICONS else font_awesome_brands()
    try:
        return icons[slug]
    except KeyError:
        raise DataError(
            f"{pack} {version(pack)} has no icon {slug!r}. Install the version that "
            "logos/common_brands.json names, or remake that list: python -m logos --brands"
        ) from None


def raster(svg: str, size: int = RASTER_SIZE) -> NDArray[np.uint8]:
    """The coverage of a single-colour SVG, trimmed to its bounding box.

    Args:
        svg: SVG source.
        size: Pixels along the longer side of the SVG's view box, before trimming.

    Returns:
        Alpha mask uint8 [height, width], 255 inside the mark.

    Raises:
        DataError: Nothing is drawn.
    """
    # Given both, resvg keeps the aspect ratio and fits the view box into the square.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    alpha: NDArray[np.uint8] = np.asarray(Image.open(io.BytesIO(png)).getchannel("A"))
    rows, columns = np.nonzero(alpha > 127)
    if not len(rows):
        raise DataError(f"the SVG draws nothing: {svg[:120]}")
    return np.array(alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])


@lru_cache(maxsize=1024)
def mask(pack: str, slug: str) -> Image.Image:
    """The trimmed alpha mask of an icon, mode "L", kept for the life of the process."""
    return Image.fromarray(raster(find(pack, slug).svg))


def _rgb(hexadecimal: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(hexadecimal)
    return red, green, blue

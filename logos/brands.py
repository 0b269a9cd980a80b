"""The brands that both packs draw to the same design: the classes of the default data.

The list is computed, kept in `common_brands.json`, and never edited by hand; `python -m logos
--brands` computes it anew. A brand is on it when

1. both packs have it under the same slug, spelling aside (`normalise`),
2. simple-icons records no licence of its own for the mark, and
3. both drawings are one design: trimmed, brought to the same size and centred on each other, their
   masks overlap by half or more (intersection over union). Packs disagree where one shows a word
   mark and the other a symbol, or a mark and the same mark cut out of a disc.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from logos.icons import FONT_AWESOME, SIMPLE_ICONS, font_awesome_brands, mask, simple_icons
from logos.splits import DataError

KEPT_LIST = Path(__file__).with_name("common_brands.json")
SAME_DESIGN = 0.5
"""The least overlap of two drawings of one design."""
ALIGNED_SIZE = 256


@dataclass(frozen=True)
class Brand:
    """A brand that both packs draw."""

    slug: str
    """Its slug in simple-icons, which is also the name of its class."""
    font_awesome: str
    """Its slug in Font Awesome."""
    overlap: float
    """Intersection over union of the two aligned drawings."""


def normalise(slug: str) -> str:
    """One spelling for the slugs of both packs.

    simple-icons joins words and writes a full stop as "dot" (`nodedotjs`); Font Awesome hyphenates
    and drops it (`node-js`).
    """
    return slug.replace("-", "").replace("_", "").replace("dot", "")


def overlap(first: Image.Image, second: Image.Image) -> float:
    """Intersection over union of two trimmed masks, scaled to one size and centred.

    Both keep their aspect ratio: the longer sides of the bounding boxes are made equal.
    """
    a, b = _aligned(first), _aligned(second)
    return float((a & b).sum() / (a | b).sum())


def _aligned(alpha: Image.Image) -> NDArray[np.bool_]:
    scale = ALIGNED_SIZE / max(alpha.size)
    width, height = (max(1, round(side * scale)) for side in alpha.size)
    canvas = Image.new("L", (ALIGNED_SIZE, ALIGNED_SIZE))
    resized = alpha.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(resized, ((ALIGNED_SIZE - width) // 2, (ALIGNED_SIZE - height) // 2))
    aligned: NDArray[np.bool_] = np.asarray(canvas) > 127
    return aligned


def common_slugs() -> dict[str, str]:
    """simple-icons slug -> Font Awesome slug of every brand both packs have."""
    theirs = {normalise(slug): slug for slug in font_awesome_brands()}
    pairs = ((slug, theirs.get(normalise(slug))) for slug in sorted(simple_icons()))
    return {slug: found for slug, found in pairs if found is not None}


def compute() -> dict[str, Any]:
    """The whole content of the kept list, from the installed packs."""
    licences: dict[str, str] = {}
    same: list[Brand] = []
    different: dict[str, float] = {}
    for slug, other in common_slugs().items():
        licence = simple_icons()[slug].licence
        if licence is not None:
            licences[slug] = licence
            continue
        share = round(overlap(mask(SIMPLE_ICONS, slug), mask(FONT_AWESOME, other)), 3)
        if share >= SAME_DESIGN:
            same.append(Brand(slug, other, share))
        else:
            different[slug] = share
    return {
        "made_by": "python -m logos --brands",
        "packs": {pack: version(pack) for pack in (SIMPLE_ICONS, FONT_AWESOME)},
        "same_design_at_overlap": SAME_DESIGN,
        "brands": [asdict(brand) for brand in same],
        "left_out_for_their_licence": licences,
        "left_out_for_another_design": different,
    }


def write(path: Path = KEPT_LIST) -> dict[str, Any]:
    """Computes the list, writes it to `path`, and returns it."""
    content = compute()
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


@lru_cache(maxsize=1)
def kept() -> tuple[Brand, ...]:
    """The kept list, in alphabetical order."""
    content: Mapping[str, Any] = json.loads(KEPT_LIST.read_text(encoding="utf-8"))
    return tuple(Brand(**brand) for brand in content["brands"])


def choose(classes: int, seed: int) -> tuple[Brand, ...]:
    """The first `classes` brands of the kept list in an order drawn from `seed`.

    A larger number of classes at the same seed adds brands and keeps the ones before.

    Raises:
        DataError: Fewer than 2 classes, or more than the list holds.
    """
    brands = kept()
    if not 2 <= classes <= len(brands):
        raise DataError(f"icons has 2 to {len(brands)} classes, not {classes}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(brands))
    return tuple(brands[index] for index in order[:classes])

"""A contact sheet of the generated data: what training, validation and the other artist look like.

It shows the first images of each split as they come, so nothing is picked to please.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from logos import augment, icons
from logos.generated import Plan, Request

COLUMNS = 10
ROWS = {"train": 4, "validation": 2, "other_artist": 4}
HEADINGS = {
    "train": f"Training: marks of {icons.SIMPLE_ICONS}",
    "validation": f"Validation: the same marks, other draws ({icons.SIMPLE_ICONS})",
    "other_artist": f"Other artist: the same brands drawn by others ({icons.FONT_AWESOME})",
}
CELL = 128
"""Pixels that an image fills at least, enlarged without smoothing so that its own are seen."""
GAP, MARGIN, CAPTION, HEADING = 10, 24, 34, 44
PAPER, INK, FAINT = (250, 250, 248), (32, 32, 36), (140, 140, 146)


def write(path: Path, request: Request) -> None:
    """Draws the sheet and saves it in the format of the path's suffix.

    Raises:
        OSError, ValueError: The file cannot be written, or its suffix names no image format.
    """
    sheet(request).save(path)


def sheet(request: Request) -> Image.Image:
    """The sheet as an RGB image; draws only the images that it shows."""
    cell = max(1, -(-CELL // request.size)) * request.size
    width = 2 * MARGIN + COLUMNS * (cell + GAP) - GAP
    height = 2 * MARGIN + sum(HEADING + rows * (cell + CAPTION) for rows in ROWS.values())
    page = Image.new("RGB", (width, height), PAPER)
    top = MARGIN
    for plan in request.plans():
        ImageDraw.Draw(page).text((MARGIN, top + 6), HEADINGS[plan.name], INK, _font(20))
        top += HEADING
        _band(page, top, plan, request, cell)
        top += ROWS[plan.name] * (cell + CAPTION)
    return page


def _band(page: Image.Image, top: int, plan: Plan, request: Request, cell: int) -> None:
    pen = ImageDraw.Draw(page)
    for index in range(min(plan.images, ROWS[plan.name] * COLUMNS)):
        sample = augment.draw(plan.marks, size=request.size, seed=request.seed, split=plan.number, index=index)
        x = MARGIN + index % COLUMNS * (cell + GAP)
        y = top + index // COLUMNS * (cell + CAPTION)
        picture = Image.fromarray(np.ascontiguousarray(sample.image.transpose(1, 2, 0)))
        page.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        # The brand's name, which is simple-icons' slug, in every band.
        names = [request.classes[number].slug for number, _ in sample.boxes]
        caption, ink = (" +\n".join(names), INK) if names else ("no logo", FAINT)
        pen.multiline_text((x, y + cell + 2), caption, ink, _font(12), spacing=1)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)

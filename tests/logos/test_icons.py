"""The packs' marks, and the list of brands that both draw alike."""

import json
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from logos import DataError, brands, icons

KEPT = json.loads(brands.KEPT_LIST.read_text(encoding="utf-8"))
NEEDS_KEPT_PACKS = pytest.mark.skipif(
    {pack: version(pack) for pack in KEPT["packs"]} != KEPT["packs"],
    reason=f"other versions of the icon packs are installed than {KEPT['packs']}",
)


@NEEDS_KEPT_PACKS
def test_packs_are_read_whole() -> None:
    assert len(icons.simple_icons()) == 3467
    assert len(icons.font_awesome_brands()) == 572


@NEEDS_KEPT_PACKS
def test_kept_list_is_what_the_packs_give() -> None:
    assert brands.compute() == KEPT
    assert len(brands.common_slugs()) == 270
    assert len(KEPT["left_out_for_their_licence"]) == 21
    assert len(KEPT["left_out_for_another_design"]) == 44
    assert len(brands.kept()) == 205


def test_kept_brands_are_free_and_paired_one_to_one() -> None:
    kept = brands.kept()
    assert all(icons.find(icons.SIMPLE_ICONS, brand.slug).licence is None for brand in kept)
    assert len({brand.font_awesome for brand in kept}) == len(kept)
    assert "git" not in {brand.slug for brand in kept}  # CC-BY-3.0


def test_icon_carries_its_brand_colour() -> None:
    assert icons.find(icons.SIMPLE_ICONS, "typescript").colour == (0x31, 0x78, 0xC6)


def test_missing_icon_names_pack_and_version() -> None:
    with pytest.raises(DataError, match=f"{icons.FONT_AWESOME} .* has no icon 'no-such'"):
        icons.find(icons.FONT_AWESOME, "no-such")


@pytest.mark.parametrize("view_box", ["0 0 40 20", "-7 3 80 40"])
def test_raster_is_trimmed_and_keeps_the_aspect(view_box: str) -> None:
    path = '<path d="M5 7h24v8h-24z"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box}">{path}</svg>'
    mask = icons.raster(svg, 400)
    pixels_per_unit = 400 / float(view_box.split()[2])
    assert mask.shape == (8 * pixels_per_unit, 24 * pixels_per_unit)
    assert (mask == 255).all()


def test_raster_keeps_holes() -> None:
    path = '<path fill-rule="evenodd" d="M0 0h30v30h-30zM10 10h10v10h-10z"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 30 30">{path}</svg>'
    expected = np.full((30, 30), 255)
    expected[10:20, 10:20] = 0
    np.testing.assert_array_equal(icons.raster(svg, 30), expected)


def test_raster_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="draws nothing"):
        icons.raster('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>')


@pytest.mark.parametrize(
    ("simple_icons", "font_awesome"),
    [("nodedotjs", "node-js"), ("hive_blockchain", "hive-blockchain"), ("500px", "500px")],
)
def test_slugs_of_one_brand_agree(simple_icons: str, font_awesome: str) -> None:
    assert brands.normalise(simple_icons) == brands.normalise(font_awesome)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((50, 50), (200, 200), 1.0),  # sizes are made equal
        ((256, 256), (256, 128), 1 / 2),  # centred in the square: half of it
        ((256, 64), (64, 256), 1 / 7),  # a cross: 64x64 shared of 256x64 twice
    ],
)
def test_overlap_of_rectangles(first: tuple[int, int], second: tuple[int, int], expected: float) -> None:
    a, b = (Image.new("L", size, 255) for size in (first, second))
    assert brands.overlap(a, b) == pytest.approx(expected)


def test_order_of_classes_is_pinned() -> None:
    # A change here changes the default classes of everybody.
    chosen = [brand.slug for brand in brands.choose(6, seed=0)]
    assert chosen == ["pixelfed", "odysee", "safari", "webawesome", "artstation", "contao"]


def test_more_classes_keep_the_ones_before() -> None:
    assert brands.choose(30, seed=4)[:10] == brands.choose(10, seed=4)
    assert brands.choose(10, seed=4) != brands.choose(10, seed=5)
    assert set(brands.choose(205, seed=1)) == set(brands.kept())


@pytest.mark.parametrize("classes", [-1, 0, 1, 206])
def test_impossible_number_of_classes_is_refused(classes: int) -> None:
    with pytest.raises(DataError, match=f"2 to 205 classes, not {classes}"):
        brands.choose(classes, seed=0)

"""`python -m logos`: makes the default data, draws a contact sheet, or remakes the brand list."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from logos import DataError, brands, generated, load, sheet
from logos.splits import Split

DESCRIPTION = """\
The default logo data: real brand marks, drawn onto backgrounds by a fixed recipe.

With no option this generates the data that `python train.py` uses, or finds it in the cache, and
tells what it holds. Generated images are kept in {cache}
and may be deleted at any time."""

EXAMPLES = """\
examples:
  python -m logos                                  make the default data, say what it is
  python -m logos --sheet sheet.png                look at it: images of every split with captions
  python -m logos --sheet big.png --size 128 --classes 100
  python -m logos --brands                         remake logos/common_brands.json after an update
                                                   of the icon packs, and count what changed"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.brands:
            _remake_brands()
        elif options.sheet:
            _draw_sheet(options)
        else:
            _summarise(options)
    except DataError as error:
        print(f"logos: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("logos: stopped; nothing was kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m logos",
        description=DESCRIPTION.format(cache=generated.default_cache_dir()),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sheet", type=Path, metavar="OUT.png", help="draw a contact sheet")
    what.add_argument(
        "--brands",
        action="store_true",
        help="compute anew which brands both icon packs draw alike, and rewrite the kept list",
    )
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default 64)")
    parser.add_argument(
        "--classes",
        type=int,
        default=generated.CLASSES,
        help=f"number of brands (default {generated.CLASSES}, at most {len(brands.kept())})",
    )
    parser.add_argument(
        "--images-per-class",
        type=int,
        default=generated.IMAGES_PER_CLASS,
        help=f"training images a class (default {generated.IMAGES_PER_CLASS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the brands and draws the images (default 0)")
    parser.add_argument("--workers", type=int, help="processes that generate (default: one a core)")
    return parser


def _remake_brands() -> None:
    content = brands.write()
    same, different, licensed = (
        len(content[key]) for key in ("brands", "left_out_for_another_design", "left_out_for_their_licence")
    )
    print(f"{same + different + licensed} brands are in both packs; of these")
    print(f"{licensed:4} are left out because the mark has a licence of its own,")
    print(f"{different:4} because the packs draw them to different designs, and")
    print(f"{same:4} are kept in {brands.KEPT_LIST}")


def _draw_sheet(options: argparse.Namespace) -> None:
    request = generated.request(
        size=options.size,
        classes=options.classes,
        images_per_class=options.images_per_class,
        seed=options.seed,
    )
    try:
        sheet.write(options.sheet, request)
    except (OSError, ValueError) as error:
        raise DataError(f"{options.sheet} cannot be written: {error}") from error
    print(f"{options.sheet} shows the first images of every split")


def _summarise(options: argparse.Namespace) -> None:
    data = load(
        size=options.size,
        classes=options.classes,
        images_per_class=options.images_per_class,
        seed=options.seed,
        workers=options.workers,
    )
    print(f"{len(data.classes)} brands: {', '.join(data.classes)}")
    print(f"{'':14}{'images':>8}{'no logo':>9}{'one':>7}{'two':>7}")
    for name, split in {"train": data.train, "validation": data.validation, **data.tests}.items():
        print(f"{name:14}{_counts(split)}")


def _counts(split: Split) -> str:
    none, one, two = np.bincount(split.targets.sum(axis=1), minlength=3)
    return f"{len(split):8}{none:9}{one:7}{two:7}"


if __name__ == "__main__":
    sys.exit(main())

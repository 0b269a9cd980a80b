"""Images of logos to train on: `load()` makes the default data, `load("rs:PATH")` reads a folder.

`logos/README.md` tells what the images are, where the marks come from, and under which licences.
"""

from __future__ import annotations

from pathlib import Path

from logos.splits import DataError, LogoData, Split

__all__ = ["DataError", "LogoData", "Split", "load"]


def load(
    spec: str = "icons",
    *,
    size: int | tuple[int, int] = 64,
    classes: int | None = None,
    images_per_class: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> LogoData:
    """Loads a data set.

    Args:
        spec: "icons", brand marks drawn onto backgrounds by a fixed recipe; or "rs:PATH", a folder
            in the format of the 2017 challenge.
        size: Side of the images in pixels, or (height, width); square and 16 or more for icons.
        classes: Number of brands of icons, 20 unless given. A larger number keeps the brands of a
            smaller one at the same seed.
        images_per_class: Training images a class of icons, 500 unless given; a tenth as many
            validation images and a fifth as many of the other artist's come with them.
        seed: Chooses the brands and draws the images of icons, 0 or more.
        workers: Processes that generate icons; as many as the machine has cores unless given. The
            images do not depend on it. With more than 1, a script needs its
            `if __name__ == "__main__":`.
        cache_dir: Where generated images are kept; `caps_kernels/logos` in `$XDG_CACHE_HOME` or
            `~/.cache` unless given.
        progress: Whether to show progress bars.

    Returns:
        The class names and the splits; icons has one further test set, "other artist".

    Raises:
        DataError: An unknown spec, an argument that does not go with it, or data that cannot be
            used; the message says what to do.
    """
    kind, _, path = spec.partition(":")
    shape = (size, size) if isinstance(size, int) else size
    if spec == "icons":
        from logos import generated

        if shape[0] != shape[1]:
            raise DataError(f"icons are square, not {shape[0]}x{shape[1]}: give one size")
        return generated.load(
            size=shape[0],
            classes=generated.CLASSES if classes is None else classes,
            images_per_class=(generated.IMAGES_PER_CLASS if images_per_class is None else images_per_class),
            seed=seed,
            workers=workers,
            cache_dir=cache_dir,
            progress=progress,
        )
    if kind == "rs" and path:
        if classes is not None or images_per_class is not None:
            raise DataError(f"classes and images_per_class belong to icons; {spec} has its own number of both")
        from logos import rs

        return rs.load(Path(path), size=shape, progress=progress)
    raise DataError(f'unknown data {spec!r}: give "icons" or "rs:PATH"')

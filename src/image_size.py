"""Sizes of images: a number for a square, or height and width."""

from __future__ import annotations

from collections.abc import Sequence

from src.errors import SettingError

Size = int | Sequence[int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Returns height and width in pixels of a ``size``: a number is the side of a square.

    Raises:
        SettingError: it is neither a whole number of at least 1 nor two of them.
    """
    sides = (size, size) if not isinstance(size, Sequence) or isinstance(size, str) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise SettingError(f"image_size: a size is a whole number of pixels, or [height, width]; got {size!r}")
    return int(sides[0]), int(sides[1])


def fitted_box(height: int, width: int, size: Size) -> tuple[float, float]:
    """Returns the sides of the largest box in an image of ``height`` x ``width`` with the proportions of ``size``."""
    rows, columns = height_and_width(size)
    if rows == columns:
        return float(min(height, width)), float(min(height, width))  # exact, without a division
    scale = min(height / rows, width / columns)
    return min(float(height), rows * scale), min(float(width), columns * scale)

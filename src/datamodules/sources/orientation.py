"""Turns ground truth that belongs to an image as it is stored, where the image is turned upright by its EXIF data."""

from __future__ import annotations

import numpy as np

from src.datamodules.decoding import SIDEWAYS, BadSample, EncodedImage

# by EXIF orientation: whether rows and columns are exchanged, and then mirrored left to right and top to bottom
_STEPS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def truth_orientation(image: EncodedImage, size: tuple[int, int] | None, what: str) -> int:
    """Returns the EXIF orientation by which ground truth must be turned to fit its upright image; 1 for none.

    Args:
        image: the image.
        size: height and width that the ground truth has, or was made for; None if it does not say.
        what: the ground truth, for messages.

    Raises:
        BadSample: the size is that of another image, or cannot tell whether the ground truth is upright.
    """
    upright, orientation = image.size, image.orientation
    stored = upright[::-1] if orientation in SIDEWAYS else upright
    if size is not None and size not in (upright, stored):
        raise BadSample(f"its {what} has {size[0]}x{size[1]} pixels, the image {upright[0]}x{upright[1]}")
    if orientation == 1 or (size == upright != stored):
        return 1
    if size == stored != upright:
        return orientation
    raise BadSample(
        f"the image is turned by its EXIF data (orientation {orientation}), and its {what} does not tell whether it "
        "belongs to the turned image: save the image upright"
    )


def turn_pixels(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels [..., H, W] upright."""
    exchanged, left_right, top_bottom = _STEPS[orientation]
    if exchanged:
        values = values.swapaxes(-1, -2)
    if left_right:
        values = values[..., ::-1]
    if top_bottom:
        values = values[..., ::-1, :]
    return np.ascontiguousarray(values)


def turn_vectors(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns a field of vectors [3, H, W] upright: x to the right, y down, z away."""
    exchanged, left_right, top_bottom = _STEPS[orientation]
    x, y, z = turn_pixels(values, orientation)
    if exchanged:
        x, y = y, x
    return np.stack([-x if left_right else x, -y if top_bottom else y, z])


def turn_boxes(boxes: np.ndarray, orientation: int, size: tuple[int, int]) -> np.ndarray:
    """Turns boxes [T, 4] (x0 y0 x1 y1) of the stored image, of ``size`` (height, width), upright."""
    exchanged, left_right, top_bottom = _STEPS[orientation]
    height, width = size
    if exchanged:
        boxes, (height, width) = boxes[:, [1, 0, 3, 2]], (width, height)
    if left_right:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    if top_bottom:
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1)
    return boxes

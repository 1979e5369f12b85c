"""Views of the whole image squeezed to the result's proportions, as SigLIP, LiT and ALIGN see images: nothing is cut
off at the longer side, and objects change their proportions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.datamodules.views.augment import RandAugmentCrop
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.image_size import height_and_width


@dataclass(frozen=True)
class SqueezedCrop(RandomResizedCrop):
    """`RandomResizedCrop` of the image squeezed to a square, or to the proportions of ``size``, in one resampling.

    Args:
        size, scale, ratio, flip, interpolation: see `RandomResizedCrop`; ``scale`` (1, 1) and ``ratio`` (1, 1) are the
            whole image.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Returns boxes [B, 4] (top, left, height, width) in pixels of the image, not rounded."""
        side, (rows, columns) = max(height, width), height_and_width(self.size)
        # the image as it is squeezed to exactly the proportions of the result
        times = -(-side // max(rows, columns))
        rows, columns = (side, side) if rows == columns else (rows * times, columns * times)
        boxes = super().boxes(rows, columns, uniform)
        return boxes * np.array([height, width, height, width]) / np.array([rows, columns, rows, columns])


@dataclass(frozen=True)
class SqueezedRandAugmentCrop(RandAugmentCrop):
    """`RandAugmentCrop` of the image squeezed to a square.

    Args:
        size, scale, policy, flip, erase, mean, std: see `RandAugmentCrop`; ``scale`` (1, 1) is the whole image.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    erase: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_crop", SqueezedCrop(self.size, scale=self.scale, flip=self.flip))


@dataclass(frozen=True)
class SqueezedCenterCrop(CenterCrop):
    """Squeezes the image, whatever its proportions, and crops the center. Takes no random numbers.

    Args:
        size: side of the result in pixels, or its height and width.
        share: of each side of the image that is kept; 1 keeps the whole image.
    """

    share: float = 1.0

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        rows, columns = height * self.share, width * self.share
        return (height - rows) / 2, (width - columns) / 2, rows, columns

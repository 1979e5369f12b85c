"""Views of the whole image squeezed to the result's proportions, as SigLIP, LiT and ALIGN see images: nothing is cut
off at the longer side, and objects change their proportions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.datamodules.views.augment import RandAugmentCrop
from src.datamodules.views.image import CenterCrop, RandomResizedCrop


@dataclass(frozen=True)
class SqueezedCrop(RandomResizedCrop):
    """`RandomResizedCrop` of the image squeezed to a square, in one resampling.

    Args:
        size, scale, ratio, flip, interpolation: see `RandomResizedCrop`; ``scale`` (1, 1) and ``ratio`` (1, 1) are the
            whole image.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Returns boxes [B, 4] (top, left, height, width) in pixels of the image, not rounded."""
        side = max(height, width)
        return super().boxes(side, side, uniform) * np.array([height, width, height, width]) / side


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

"""Views that make an `ImageBatch`: one image, cropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from src.datamodules.batches.image import ImageBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.views.resample import resample_boxes

_TRIES = 10


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box of the image, resized, mirrored with probability ``flip``; torchvision's distribution of boxes.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.
        flip: probability of a left-right mirror.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    batch_type: ClassVar[type] = ImageBatch
    draws: ClassVar[int] = 4 * _TRIES + 1

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"RandomResizedCrop: scale must be 0 < low <= high <= 1, got {tuple(self.scale)}")

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        height, width = image.size
        top, left, rows, columns = self.boxes(height, width, uniform[None])[0]
        pixels = to_tensor(image.decode(box=(top, left, rows, columns), size=(self.size, self.size)))
        return {"image": pixels.flip(-1) if uniform[-1] < self.flip else pixels}

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        boxes = self.boxes(images.shape[-2], images.shape[-1], uniform)
        return {"image": resample_boxes(images, boxes, self.size, flip=uniform[:, -1] < self.flip)}

    def of_picture(self, picture: Image, uniform: np.ndarray) -> Tensor:
        """An image that is decoded already and of which more is wanted, uniform [draws] -> uint8 [3, size, size]."""
        top, left, rows, columns = self.boxes(picture.height, picture.width, uniform[None])[0]
        box = (left, top, left + columns, top + rows)
        pixels = to_tensor(picture.resize((self.size, self.size), Resampling.BICUBIC, box=box))
        return pixels.flip(-1) if uniform[-1] < self.flip else pixels

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Integer boxes [B, 4] (top, left, height, width): the first of ten tries that fits, else the largest centered
        box of an allowed ratio."""
        tries = uniform[:, : 4 * _TRIES].reshape(-1, _TRIES, 4).astype(np.float64)
        area = height * width * (self.scale[0] + tries[..., 0] * (self.scale[1] - self.scale[0]))
        log_low, log_high = np.log(self.ratio[0]), np.log(self.ratio[1])
        ratio = np.exp(log_low + tries[..., 1] * (log_high - log_low))
        columns, rows = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
        top = np.floor(tries[..., 2] * (height - rows + 1))
        left = np.floor(tries[..., 3] * (width - columns + 1))
        candidates = np.stack([top, left, rows, columns], axis=-1)
        chosen = candidates[np.arange(len(candidates)), fits.argmax(axis=1)]
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        centered_columns, centered_rows = min(width, round(height * shape)), min(height, round(width / shape))
        centered = ((height - centered_rows) // 2, (width - centered_columns) // 2, centered_rows, centered_columns)
        return np.where(fits.any(axis=1)[:, None], chosen, np.asarray(centered, np.float64))


@dataclass(frozen=True)
class CenterCrop:
    """The image's middle: the largest centered square shrunk by ``share``, resized. No randomness.

    ``share`` 0.875 is the usual resize to 256, crop 224, done in one resampling.

    Args:
        size: side of the result in pixels.
        share: side of the square over the image's shorter side.
    """

    size: int
    share: float = 0.875

    batch_type: ClassVar[type] = ImageBatch
    draws: ClassVar[int] = 0

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        return {"image": to_tensor(image.decode(box=self._box(*image.size), size=(self.size, self.size)))}

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        if images.shape[-2:] == (self.size, self.size) and self.share == 1:
            return {"image": images}
        box = self._box(images.shape[-2], images.shape[-1])
        return {"image": resample_boxes(images, np.tile(np.asarray(box, np.float64), (len(images), 1)), self.size)}

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        side = min(height, width) * self.share
        return (height - side) / 2, (width - side) / 2, side, side


def to_tensor(image: Image) -> Tensor:
    """A PIL RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)

"""Views that make an `ImageBatch`: one crop of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from src.datamodules.batches.image import ImageBatch
from src.datamodules.decoding import EncodedImage, resize
from src.datamodules.views.resample import Interpolation, resample_boxes
from src.datamodules.views.view import ImageView
from src.errors import SettingError
from src.image_size import Size, fitted_box, height_and_width

_TRIES = 10


@dataclass(frozen=True)
class RandomResizedCrop(ImageView):
    """Crops a random box, resizes it and mirrors it with probability ``flip``; boxes are distributed as torchvision's.

    Args:
        size: side of the result in pixels, or its height and width.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest aspect ratio of the box, width over height, over that of ``size``: 1 keeps the
            proportions of objects. torchvision's is not relative to the size, which is the same for squares.
        flip: probability of a left-right mirror.
        interpolation: "bicubic", or "bilinear" as torchvision's crops are without a setting.

    Raises:
        SettingError: the size is none, the scale is not 0 < low <= high <= 1, or an unknown interpolation.
    """

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: Interpolation = "bicubic"

    batch_type: ClassVar[type] = ImageBatch
    num_uniforms: ClassVar[int] = 4 * _TRIES + 1

    def __post_init__(self) -> None:
        height_and_width(self.size)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise SettingError(f"RandomResizedCrop: scale must be 0 < low <= high <= 1, got {tuple(self.scale)}")
        if self.interpolation not in get_args(Interpolation):
            raise SettingError(
                f"RandomResizedCrop: interpolation must be {' or '.join(get_args(Interpolation))}, "
                f"got '{self.interpolation}'"
            )

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        height, width = image.size
        top, left, rows, columns = self.boxes(height, width, uniform[None])[0]
        box, size = (top, left, rows, columns), height_and_width(self.size)
        pixels = to_tensor(image.decode(box=box, size=size, interpolation=self._resampling))
        return {"image": pixels.flip(-1) if self.flipped(uniform) else pixels}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        boxes = self.boxes(images.shape[-2], images.shape[-1], uniform)
        flip = self.flipped(uniform)
        return {"image": resample_boxes(images, boxes, self.size, flip=flip, interpolation=self.interpolation)}

    def from_pil(self, image: Image, uniform: np.ndarray) -> Tensor:
        """Makes one of several views of an image that is decoded once: uniform [num_uniforms] -> uint8 [C, h, w]."""
        top, left, rows, columns = self.boxes(image.height, image.width, uniform[None])[0]
        box = (left, top, left + columns, top + rows)
        pixels = to_tensor(resize(image, height_and_width(self.size)[::-1], self._resampling, box))
        return pixels.flip(-1) if self.flipped(uniform) else pixels

    @property
    def _resampling(self) -> Resampling:
        """Pillow's name of the interpolation."""
        return Resampling[self.interpolation.upper()]

    def flipped(self, uniform: np.ndarray) -> np.ndarray:
        """Returns which crops are mirrored: uniform [..., num_uniforms] -> bool [...]."""
        return uniform[..., -1] < self.flip

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Returns integer boxes [B, 4] (top, left, height, width): the first of ten tries that fits into the image,
        else the largest centered box of an allowed aspect ratio."""
        tries = uniform[:, : 4 * _TRIES].reshape(-1, _TRIES, 4).astype(np.float64)
        area = height * width * (self.scale[0] + tries[..., 0] * (self.scale[1] - self.scale[0]))
        out_height, out_width = height_and_width(self.size)
        low, high = (ratio * (out_width / out_height) for ratio in self.ratio)
        log_low, log_high = np.log(low), np.log(high)
        ratio = np.exp(log_low + tries[..., 1] * (log_high - log_low))
        columns, rows = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
        top = np.floor(tries[..., 2] * (height - rows + 1))
        left = np.floor(tries[..., 3] * (width - columns + 1))
        candidates = np.stack([top, left, rows, columns], axis=-1)
        chosen = candidates[np.arange(len(candidates)), fits.argmax(axis=1)]
        shape = min(max(width / height, low), high)
        centered_columns, centered_rows = min(width, round(height * shape)), min(height, round(width / shape))
        centered = ((height - centered_rows) // 2, (width - centered_columns) // 2, centered_rows, centered_columns)
        return np.where(fits.any(axis=1)[:, None], chosen, np.asarray(centered, np.float64))


@dataclass(frozen=True)
class CenterCrop(ImageView):
    """Crops the center, the largest square of the image times ``share``, and resizes it. Takes no random numbers. For a
    size that is no square it is the largest box of its proportions.

    ``share`` 0.875 is the usual resize to 256 and crop to 224, in one resampling.

    Args:
        size: side of the result in pixels, or its height and width.
        share: side of the square over the image's shorter side.

    Raises:
        SettingError: the size is none, or the share is not in (0, 1].
    """

    size: Size
    share: float = 0.875

    batch_type: ClassVar[type] = ImageBatch
    num_uniforms: ClassVar[int] = 0

    def __post_init__(self) -> None:
        height_and_width(self.size)
        if not 0 < self.share <= 1:
            raise SettingError(f"CenterCrop: share must lie in (0, 1], got {self.share}")

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        return {"image": to_tensor(image.decode(box=self._box(*image.size), size=height_and_width(self.size)))}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        if images.shape[-2:] == height_and_width(self.size) and self.share == 1:
            return {"image": images}
        box = self._box(images.shape[-2], images.shape[-1])
        return {"image": resample_boxes(images, np.tile(np.asarray(box, np.float64), (len(images), 1)), self.size)}

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        rows, columns = (side * self.share for side in fitted_box(height, width, self.size))
        return (height - rows) / 2, (width - columns) / 2, rows, columns


def to_tensor(image: Image) -> Tensor:
    """Converts a PIL image of 8 bits a channel to uint8 [C, H, W]: 1 channel of mode L, 3 of RGB, 4 of RGBA."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

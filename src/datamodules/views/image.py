"""Views that make an `ImageBatch`: one crop of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from src.datamodules.batches.image import ImageBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.views.resample import Interpolation, resample_boxes
from src.datamodules.views.view import ImageView
from src.errors import SettingError

_TRIES = 10


@dataclass(frozen=True)
class RandomResizedCrop(ImageView):
    """Crops a random box, resizes it and mirrors it with probability ``flip``; boxes are distributed as torchvision's.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest aspect ratio, width over height.
        flip: probability of a left-right mirror.
        interpolation: "bicubic", or "bilinear" as torchvision's crops are without a setting.

    Raises:
        SettingError: the scale is not 0 < low <= high <= 1, or an unknown interpolation.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: Interpolation = "bicubic"

    batch_type: ClassVar[type] = ImageBatch
    num_uniforms: ClassVar[int] = 4 * _TRIES + 1

    def __post_init__(self) -> None:
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
        box, size = (top, left, rows, columns), (self.size, self.size)
        pixels = to_tensor(image.decode(box=box, size=size, interpolation=self._resampling))
        return {"image": pixels.flip(-1) if self.flipped(uniform) else pixels}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        boxes = self.boxes(images.shape[-2], images.shape[-1], uniform)
        flip = self.flipped(uniform)
        return {"image": resample_boxes(images, boxes, self.size, flip=flip, interpolation=self.interpolation)}

    def from_pil(self, image: Image, uniform: np.ndarray) -> Tensor:
        """Makes one of several views of an image that is decoded once: uniform [num_uniforms] -> uint8 [3, S, S]."""
        top, left, rows, columns = self.boxes(image.height, image.width, uniform[None])[0]
        box = (left, top, left + columns, top + rows)
        pixels = to_tensor(image.resize((self.size, self.size), self._resampling, box=box))
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
class CenterCrop(ImageView):
    """Crops the center, the largest square of the image times ``share``, and resizes it. Takes no random numbers.

    ``share`` 0.875 is the usual resize to 256 and crop to 224, in one resampling.

    Args:
        size: side of the result in pixels.
        share: side of the square over the image's shorter side.
    """

    size: int
    share: float = 0.875

    batch_type: ClassVar[type] = ImageBatch
    num_uniforms: ClassVar[int] = 0

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        return {"image": to_tensor(image.decode(box=self._box(*image.size), size=(self.size, self.size)))}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        if images.shape[-2:] == (self.size, self.size) and self.share == 1:
            return {"image": images}
        box = self._box(images.shape[-2], images.shape[-1])
        return {"image": resample_boxes(images, np.tile(np.asarray(box, np.float64), (len(images), 1)), self.size)}

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        side = min(height, width) * self.share
        return (height - side) / 2, (width - side) / 2, side, side


def to_tensor(image: Image) -> Tensor:
    """Converts a PIL RGB image to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)

"""Transforms of images with ground truth that torchvision does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from src.datamodules.batches.base import IGNORED
from src.errors import SettingError
from src.image_size import Size, height_and_width

MEAN_COLOR = (124, 116, 104)
"""ImageNet's mean color, which becomes 0 by normalization."""

MEAN_GRAY = 117
"""Luma of the mean color."""

_TRIES = 10

_NEED_RGB = (v2.RandomGrayscale, v2.RandomPhotometricDistort, v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide)
_NEED_RGB_OR_GRAY = (v2.ColorJitter, v2.RandomAdjustSharpness, v2.RandomAutocontrast, v2.RandomEqualize, v2.AugMix)
_CONTAINERS = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)


def check_transform(transform: Any, channels: int) -> None:
    """Checks that one of torchvision's transforms, or one of ours, can change images of ``channels``.

    Raises:
        SettingError: it needs RGB, or a color of padding with as many numbers.
    """
    if isinstance(transform, _CONTAINERS):
        for inner in transform.transforms:
            check_transform(inner, channels)
    name = type(transform).__name__
    of_colors = isinstance(transform, v2.ColorJitter) and (transform.saturation or transform.hue)
    if channels != 3 and (isinstance(transform, _NEED_RGB) or of_colors):
        what = "saturation and hue of ColorJitter need" if of_colors else f"{name} needs"
        raise SettingError(f"data.train_view.transforms: {what} RGB, and data.channels is {channels}: leave it out")
    if channels not in (1, 3) and isinstance(transform, _NEED_RGB_OR_GRAY):
        raise SettingError(
            f"data.train_view.transforms: {name} needs RGB or grayscale, and data.channels is {channels}: leave it out"
        )
    if isinstance(transform, PaddedCrop):
        padding_color(transform.fill, channels)


def padding_color(fill: Sequence[int] | None, channels: int) -> list[float]:
    """Returns the color of padding of images with ``channels``; None stands for `MEAN_COLOR`, or its luma.

    Raises:
        SettingError: ``fill`` has another number of channels, or there is no mean color of so many.
    """
    if fill is None and channels in (1, 3):
        fill = MEAN_COLOR if channels == 3 else (MEAN_GRAY,)
    if fill is None or len(fill) != channels:
        got = "is not set" if fill is None else f"has {len(fill)} numbers"
        raise SettingError(
            f"data.train_view, data.eval_view: the color of padding, fill, {got}, and data.channels is {channels}: set "
            "as many numbers from 0 to 255"
        )
    return [float(channel) for channel in fill]


class RandomRescale(v2.Transform):
    """Resizes an image to the largest size at which its shorter side is at most ``shorter`` times a random number, and
    its longer side at most ``longer`` times the same number. Images are interpolated bilinearly with antialiasing;
    masks and depths take the nearest pixel.

    Args:
        shorter: side in pixels.
        longer: side in pixels; None for no limit.
        ratio: smallest and largest random number; (1, 1) for none.

    Raises:
        SettingError: an argument is out of range.
    """

    def __init__(self, shorter: int, longer: int | None = None, ratio: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        if shorter < 1 or (longer is not None and longer < shorter) or not 0 < ratio[0] <= ratio[1]:
            raise SettingError(
                "RandomRescale: 1 <= shorter <= longer and 0 < low <= high ratio are needed, got "
                f"{shorter}, {longer} and {tuple(ratio)}"
            )
        self.shorter, self.longer, self.ratio = shorter, longer, (float(ratio[0]), float(ratio[1]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size_of(flat_inputs)
        low, high = self.ratio
        factor = low + (high - low) * float(torch.rand(()))
        scale = factor * self.shorter / min(height, width)
        if self.longer is not None:
            scale = min(scale, factor * self.longer / max(height, width))
        return {"size": [max(1, int(side * scale + 0.5)) for side in (height, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        nearest = isinstance(inpt, tv_tensors.Mask)
        mode = v2.InterpolationMode.NEAREST_EXACT if nearest else v2.InterpolationMode.BILINEAR
        return F.resize(inpt, size=params["size"], interpolation=mode, antialias=True)


class PaddedCrop(v2.Transform):
    """Crops a random part of an image. A smaller image is padded at the right and at the bottom: images with ``fill``,
    segmentation masks with IGNORED, depths and instance masks with 0.

    Args:
        size: side of the part, or its height and width, in pixels.
        max_share: a crop is drawn again, up to ten times, until no class of the segmentation mask covers a larger share
            of its pixels that count.
        fill: color of the padding; None for ImageNet's mean color, which becomes 0 by normalization.

    Raises:
        SettingError: an argument is out of range.
    """

    def __init__(self, size: Size, max_share: float = 1.0, fill: Sequence[int] | None = None) -> None:
        super().__init__()
        self.size = height_and_width(size)
        if not 0 < max_share <= 1:
            raise SettingError(f"PaddedCrop: max_share in (0, 1] is needed, got {max_share}")
        self.max_share = max_share
        self.fill = None if fill is None else tuple(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size_of(flat_inputs)
        rows, columns = min(self.size[0], height), min(self.size[1], width)
        mask = next((part for part in flat_inputs if isinstance(part, tv_tensors.Mask) and part.ndim == 2), None)
        tries = _TRIES if self.max_share < 1 and mask is not None and mask.dtype == torch.uint8 else 1
        for _ in range(tries):
            top = int(torch.randint(0, height - rows + 1, ()))
            left = int(torch.randint(0, width - columns + 1, ()))
            if mask is None or tries == 1:
                break
            cropped = mask[top : top + rows, left : left + columns].flatten()
            counts = torch.bincount(cropped[cropped != IGNORED].long())
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return {"top": top, "left": left, "height": rows, "width": columns}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        part = F.crop(inpt, **params)
        bottom, right = self.size[0] - params["height"], self.size[1] - params["width"]
        if not bottom and not right:
            return part
        fill: Any
        if isinstance(inpt, tv_tensors.Mask):
            fill = IGNORED if inpt.ndim == 2 and inpt.dtype == torch.uint8 else 0
        elif isinstance(inpt, tv_tensors.Image):
            fill = padding_color(self.fill, inpt.shape[-3])
        else:
            fill = 0  # bounding boxes have no color
        return F.pad(part, [0, 0, right, bottom], fill=fill)


def _size_of(inputs: list[Any]) -> tuple[int, int]:
    """Returns height and width of the image among the inputs of a transform."""
    height, width = next(part for part in inputs if isinstance(part, tv_tensors.Image)).shape[-2:]
    return int(height), int(width)

"""Crops, resizes and mirrors whole batches at once, with a box of its own for each image."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from src.image_size import Size, height_and_width

Interpolation = Literal["bilinear", "bicubic"]
"""Antialiased interpolation, as Pillow's; torchvision's crops are bilinear without a setting."""


def resample_boxes(
    images: Tensor,
    boxes: np.ndarray,
    size: Size,
    flip: np.ndarray | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Crops a box of every image and resizes it to ``size`` with antialiased interpolation.

    Both axes are resampled by one small matrix an image, so that a batch costs two matrix products. Values agree with
    ``PIL.Image.resize(box=…, resample=…)`` up to rounding.

    Args:
        images: uint8 [B, C, H, W].
        boxes: float [B, 4] as (top, left, height, width) in pixels.
        size: side of the result, or its height and width (h, w).
        flip: bool [B], True to mirror left to right; None for no mirroring.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 [B, C, h, w].
    """
    height, width = images.shape[-2:]
    out_height, out_width = height_and_width(size)
    rows = torch.from_numpy(_weights(boxes[:, 0], boxes[:, 2], height, out_height, interpolation)).to(images.device)
    columns = _weights(boxes[:, 1], boxes[:, 3], width, out_width, interpolation)
    if flip is not None:
        columns = np.where(flip[:, None, None], columns[:, ::-1], columns)
    columns_t = torch.from_numpy(np.ascontiguousarray(columns.transpose(0, 2, 1))).to(images.device)
    batch, channels = images.shape[:2]
    pixels = images.to(torch.float32)
    narrow = torch.bmm(pixels.reshape(batch, channels * height, width), columns_t)
    narrow = narrow.round_().clamp_(0, 255)  # PIL rounds to 8 bits between its two passes
    narrow = narrow.reshape(batch, channels, height, out_width).transpose(1, 2).reshape(batch, height, -1)
    result = torch.bmm(rows, narrow).reshape(batch, out_height, channels, out_width).transpose(1, 2)
    return result.round_().clamp_(0, 255).to(torch.uint8)


def resample_box(
    frames: Tensor, box: np.ndarray, size: Size, flip: bool = False, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Crops the same box of every frame of a clip and resizes it to ``size``, antialiased, as PIL does.

    The box is rounded to whole pixels, and pixels around it take no part in the interpolation, which is cheaper for
    many frames of one box.

    Args:
        frames: uint8 [T, C, H, W].
        box: float [4] as (top, left, height, width) in pixels.
        size: side of the result, or its height and width (h, w).
        flip: mirrors left to right.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 [T, C, h, w].
    """
    top, left, rows, columns = whole_pixels(box)
    part = frames[..., top : top + rows, left : left + columns]
    out = height_and_width(size)
    if (rows, columns) != out:
        part = F.interpolate(part, out, mode=interpolation, antialias=True)
    return part.flip(-1) if flip else part


def whole_pixels(box: np.ndarray) -> tuple[int, int, int, int]:
    """Rounds both corners of a box (top, left, height, width), which keeps at least one pixel."""
    top, left, bottom, right = (int(edge) for edge in np.rint([box[0], box[1], box[0] + box[2], box[1] + box[3]]))
    return top, left, max(1, bottom - top), max(1, right - left)


def _weights(start: np.ndarray, length: np.ndarray, source: int, size: int, interpolation: Interpolation) -> np.ndarray:
    """Returns interpolation matrices [B, size, source]; row o weighs the source pixels of output pixel o."""
    scale = (length / size)[:, None, None]
    stretch = np.maximum(scale, 1.0)
    kernel, reach = (_bicubic, 2.0) if interpolation == "bicubic" else (_bilinear, 1.0)
    support = reach * stretch
    center = start[:, None, None] + (np.arange(size)[None, :, None] + 0.5) * scale
    # PIL uses whole pixels between these bounds alone, which matters at the edge of the support
    first = np.maximum(np.floor(center - support + 0.5), 0)
    last = np.minimum(np.floor(center + support + 0.5), source)
    taps = int(np.ceil(2 * support.max())) + 1  # largest number of weights of a row
    pixel = first + np.arange(taps)
    weight = kernel((pixel + 0.5 - center) / stretch) * (pixel < last)
    weight /= weight.sum(axis=-1, keepdims=True)
    matrix = np.zeros((len(start), size, source + taps), np.float32)  # zero weights may lie beyond the image
    np.put_along_axis(matrix, pixel.astype(np.int64), weight.astype(np.float32), axis=-1)
    return matrix[..., :source]


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -0.5, as in PIL."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    """The triangle kernel, as in PIL."""
    return np.maximum(0.0, 1.0 - np.abs(x))

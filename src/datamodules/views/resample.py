"""Crop, resize and flip whole batches at once, each image by a box of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def resample_boxes(images: Tensor, boxes: np.ndarray, size: int, flip: np.ndarray | None = None) -> Tensor:
    """Cut a box from every image and bring it to size x size with antialiased bicubic interpolation.

    Both axes are resampled by one small matrix an image, so that a batch costs two matrix products; values agree with
    ``PIL.Image.resize(box=…, resample=BICUBIC)`` to rounding.

    Args:
        images: uint8 [B, 3, H, W].
        boxes: float [B, 4] as (top, left, height, width) in pixels.
        size: side of the result.
        flip: bool [B], mirrored left to right where true.

    Returns:
        uint8 [B, 3, size, size].
    """
    height, width = images.shape[-2:]
    rows = torch.from_numpy(_weights(boxes[:, 0], boxes[:, 2], height, size)).to(images.device)
    columns = _weights(boxes[:, 1], boxes[:, 3], width, size)
    if flip is not None:
        columns = np.where(flip[:, None, None], columns[:, ::-1], columns)
    columns_t = torch.from_numpy(np.ascontiguousarray(columns.transpose(0, 2, 1))).to(images.device)
    batch, channels = images.shape[:2]
    pixels = images.to(torch.float32)
    narrow = torch.bmm(pixels.reshape(batch, channels * height, width), columns_t)
    narrow = narrow.round_().clamp_(0, 255)  # PIL keeps 8 bits between its two passes
    narrow = narrow.reshape(batch, channels, height, size).transpose(1, 2).reshape(batch, height, channels * size)
    result = torch.bmm(rows, narrow).reshape(batch, size, channels, size).transpose(1, 2)
    return result.round_().clamp_(0, 255).to(torch.uint8)


def resample_box(frames: Tensor, box: np.ndarray, size: int, flip: bool = False) -> Tensor:
    """Cut the same box from every frame of a clip and bring it to size x size, as `resample_boxes`.

    The box is one of whole pixels, rounded, and what lies around it takes no part in the interpolation: many frames of
    one box are cheaper that way.

    Args:
        frames: uint8 [T, 3, H, W].
        box: float [4] as (top, left, height, width) in pixels.
        size: side of the result.
        flip: mirrored left to right.

    Returns:
        uint8 [T, 3, size, size].
    """
    top, left, rows, columns = whole_pixels(box)
    part = frames[..., top : top + rows, left : left + columns]
    if (rows, columns) != (size, size):
        part = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return part.flip(-1) if flip else part


def whole_pixels(box: np.ndarray) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of at least one pixel, both of its corners rounded."""
    top, left, bottom, right = (int(edge) for edge in np.rint([box[0], box[1], box[0] + box[2], box[1] + box[3]]))
    return top, left, max(1, bottom - top), max(1, right - left)


def _weights(start: np.ndarray, length: np.ndarray, source: int, size: int) -> np.ndarray:
    """Interpolation matrices [B, size, source]: row o holds the weights of the source pixels for output pixel o."""
    scale = (length / size)[:, None, None]
    stretch = np.maximum(scale, 1.0)
    support = 2.0 * stretch
    center = start[:, None, None] + (np.arange(size)[None, :, None] + 0.5) * scale
    # PIL looks at whole pixels between these bounds only, which matters at the support's rim
    first = np.maximum(np.floor(center - support + 0.5), 0)
    last = np.minimum(np.floor(center + support + 0.5), source)
    taps = int(np.ceil(2 * support.max())) + 1  # no row has more weights than these
    pixel = first + np.arange(taps)
    weight = _bicubic((pixel + 0.5 - center) / stretch) * (pixel < last)
    weight /= weight.sum(axis=-1, keepdims=True)
    matrix = np.zeros((len(start), size, source + taps), np.float32)  # zeros may fall behind the image's end
    np.put_along_axis(matrix, pixel.astype(np.int64), weight.astype(np.float32), axis=-1)
    return matrix[..., :source]


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5, as PIL has it."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))

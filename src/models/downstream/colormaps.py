"""Predictions and ground truth as images."""

from __future__ import annotations

import colorsys
from functools import cache

import torch
from torch import Tensor

from src.datamodules.batches.base import IGNORED

Color = tuple[int, int, int]

_RAMP = ((247, 251, 255), (107, 174, 214), (8, 48, 107))  # light to dark blue
_GOLDEN = 0.61803398875  # steps of this around the circle of hues never come back to where they were


def of_classes(mask: Tensor) -> Tensor:
    """A color a class: int64 [..., H, W] -> uint8 [..., 3, H, W]; the first class is dark, what is ignored white."""
    return _channels_first(_palette().to(mask.device)[mask])


def of_depths(depth: Tensor, nearest: Tensor, farthest: Tensor) -> Tensor:
    """Light where it is near: [B, H, W], and the limits of each image's colors [B] -> uint8 [B, 3, H, W]."""
    low, high = nearest[:, None, None], farthest[:, None, None]
    share = ((depth.float() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return _channels_first(_ramp().to(depth.device)[(share * 255).round().long()])


def of_normals(normals: Tensor) -> Tensor:
    """Red the farther to the right they point, green the farther up, blue the more to the camera: [B, 3, H, W] ->
    uint8 [B, 3, H, W]; what has no length is grey."""
    signs = torch.tensor((1.0, -1.0, -1.0), device=normals.device)[:, None, None]
    return ((normals.float() * signs + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _channels_first(colors: Tensor) -> Tensor:
    return colors.movedim(-1, -3).contiguous()


@cache
def _palette() -> Tensor:
    colors = [(30, 30, 30)]
    for number in range(1, IGNORED):
        hue, light = number * _GOLDEN % 1.0, 0.95 - 0.2 * (number % 3)
        colors.append(tuple(round(255 * each) for each in colorsys.hsv_to_rgb(hue, 0.75, light)))  # type: ignore[arg-type]
    return torch.tensor([*colors, (255, 255, 255)], dtype=torch.uint8)


@cache
def _ramp() -> Tensor:
    return torch.tensor([ramp(number / 255) for number in range(256)], dtype=torch.uint8)


def ramp(share: float) -> Color:
    """From light to dark for shares from 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    step = min(int(at), len(_RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (at - step)) for a, b in zip(_RAMP[step], _RAMP[step + 1], strict=True))
    return red, green, blue

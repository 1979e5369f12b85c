"""Colors of predictions and ground truth."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from src.datamodules.batches.base import IGNORED

Color = tuple[int, int, int]

_RAMP = ((247, 251, 255), (107, 174, 214), (8, 48, 107))  # light to dark blue
_GOLDEN = 0.61803398875  # multiples of the golden ratio spread the hues evenly and never repeat


def color_classes(mask: Tensor) -> Tensor:
    """Gives each class a color: int64 [..., H, W] -> uint8 [..., 3, H, W]. The first class is dark, ignored pixels are
    white."""
    return _channels_first(_palette().to(mask.device)[mask])


def color_depth(depth: Tensor, nearest: Tensor, farthest: Tensor) -> Tensor:
    """Colors depths from light (near) to dark (far).

    Args:
        depth: [B, H, W].
        nearest, farthest: depths of the lightest and the darkest color of each image, [B].

    Returns:
        uint8 [B, 3, H, W].
    """
    low, high = nearest[:, None, None], farthest[:, None, None]
    share = ((depth.float() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return _channels_first(_ramp().to(depth.device)[(share * 255).round().long()])


def color_normals(normals: Tensor) -> Tensor:
    """Colors unit vectors: [B, 3, H, W] -> uint8 [B, 3, H, W]. Red increases to the right, green upwards, blue towards
    the camera; zero vectors are gray."""
    signs = torch.tensor((1.0, -1.0, -1.0), device=normals.device)[:, None, None]
    return ((normals.float() * signs + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def beside_image(image: Tensor, colored: Sequence[Tensor], normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Puts colored maps beside the image they belong to, for `PretrainModule.visualize`.

    Args:
        image: [B, 3, H, W], normalized.
        colored: maps as uint8 [B, 3, h, w], which are resized to the image.
        normalize: the DataModule's.

    Returns:
        [B, 1 + maps, 3, H, W], normalized.
    """
    resized = [F.interpolate(values, size=image.shape[-2:], mode="nearest-exact") for values in colored]
    return torch.stack([image, *(normalize(values) for values in resized)], dim=1)


def _channels_first(colors: Tensor) -> Tensor:
    return colors.movedim(-1, -3).contiguous()


@cache
def _palette() -> Tensor:
    colors = [(30, 30, 30)]
    for number in range(1, IGNORED):
        hue, light = number * _GOLDEN % 1.0, 0.95 - 0.2 * (number % 3)
        colors.append(tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, light)))  # type: ignore[arg-type]
    return torch.tensor([*colors, (255, 255, 255)], dtype=torch.uint8)


@cache
def _ramp() -> Tensor:
    return torch.tensor([ramp(number / 255) for number in range(256)], dtype=torch.uint8)


def ramp(share: float) -> Color:
    """The color of a share: light blue at 0, dark blue at 1."""
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    step = min(int(position), len(_RAMP) - 2)
    red, green, blue = (
        round(a + (b - a) * (position - step)) for a, b in zip(_RAMP[step], _RAMP[step + 1], strict=True)
    )
    return red, green, blue

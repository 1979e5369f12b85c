"""GMML's corruption: connected groups of pixels are replaced by noise, by zeros or by parts of another image."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from src.errors import SettingError


class Fill(StrEnum):
    """The pixels in the place of those that are dropped."""

    noise = "noise"
    zeros = "zeros"


def group_masks(
    seeds: Tensor, size: tuple[int, int], share: tuple[float, float], *, align: int = 1, max_block: float = 0.3
) -> Tensor:
    """Draws masks of connected pixels (Atito et al., 2022), bool [B, 1, H, W], True where corrupted.

    Rectangles at random places are masked until they cover a random share of the image; what they cover together
    counts once. As in the authors' code a rectangle's sides are at least ``align`` and less than ``max_block`` of the
    image's, and it never begins in the last ``align`` rows or columns. A pure function of its arguments.

    Args:
        seeds: [B], random numbers in [0, 1), one for each mask.
        size: height and width in pixels.
        share: smallest and largest share of the pixels to cover; the last rectangle may cover more.
        align: multiple of the rectangles' places and sides in pixels: the patch size masks whole patches, 1 any pixels.
        max_block: largest side of a rectangle over the image's.

    Raises:
        SettingError: a share out of range, or an alignment that is no part of the image.
    """
    height, width = size
    if not 0 < share[0] <= share[1] < 1:
        raise SettingError(f"model.drop_share, model.alien_share: {list(share)} must lie between 0 and 1")
    if not 0 < max_block <= 1:
        raise SettingError(f"model.max_block={max_block} must lie in (0, 1]")
    if not 1 <= align < min(size) or height % align or width % align:
        raise SettingError(f"model.align={align} must divide the sides of an image of {height}x{width} pixels")
    masks = np.zeros((len(seeds), height, width), dtype=bool)
    for mask, seed in zip(masks, seeds.tolist(), strict=True):
        draw = random.Random(seed)
        least, covered = draw.uniform(*share) * height * width, 0
        while covered < least:
            top, bottom = _span(draw, height, align, max_block)
            left, right = _span(draw, width, align, max_block)
            block = mask[top:bottom, left:right]
            covered += block.size - int(block.sum())
            block[:] = True
    return torch.from_numpy(masks).unsqueeze(1)


def _span(draw: random.Random, side: int, align: int, max_block: float) -> tuple[int, int]:
    """Returns the beginning and the end of a rectangle along one side."""
    begin = draw.randrange(side - align) // align * align
    length = draw.randrange(align, max(align + 1, int(side * max_block)))
    return begin, begin + round(min(length, side - begin) / align) * align


@dataclass(frozen=True)
class Corruption:
    """Corrupts views of images for GMML and SiT: [B, V, C, H, W] -> corrupted [B, V, C, H, W], and where, bool
    [B, V, 1, H, W].

    One half of the views, at random, has groups of at least half of its pixels (or ``drop_share``, if that is less)
    and at most ``drop_share`` replaced by noise or zeros. The other half has groups of ``alien_share`` replaced by the
    pixels at the same place in the same view of another image of this process's batch, which may be the image itself.

    Args:
        fill: "noise" from N(0, 1), or "zeros".
        drop_share: largest share of the pixels that noise or zeros replace.
        alien_share: likewise for pixels of another image; 0 for none of them.
        align, max_block: see `group_masks`.

    Raises:
        SettingError: an unknown fill; when called, those of `group_masks`.
    """

    fill: str
    drop_share: float
    alien_share: float
    align: int = 1
    max_block: float = 0.3

    def __post_init__(self) -> None:
        if self.fill not in list(Fill):
            raise SettingError(f"model.fill must be {' or '.join(Fill)}, got '{self.fill}'")

    def __call__(self, views: Tensor) -> tuple[Tensor, Tensor]:
        count, size = views.shape[:2], (views.shape[-2], views.shape[-1])
        seeds = torch.rand(count)
        is_alien = (torch.rand(count) < 0.5) if self.alien_share > 0 else torch.zeros(count, dtype=torch.bool)
        other = torch.randint(count[0], count)
        masks = torch.zeros(*count, 1, *size, dtype=torch.bool)
        for chosen, largest in ((is_alien, self.alien_share), (~is_alien, self.drop_share)):
            if chosen.any():
                share = (min(0.5, largest), largest)
                masks[chosen] = group_masks(seeds[chosen], size, share, align=self.align, max_block=self.max_block)
        device = views.device
        masks, is_alien, other = masks.to(device), is_alien.to(device), other.to(device)
        aliens = views[other, torch.arange(count[1], device=device)]
        replacement = torch.randn_like(views) if self.fill == Fill.noise else torch.zeros_like(views)
        replacement = torch.where(is_alien[..., None, None, None], aliens, replacement)
        return torch.where(masks, replacement, views), masks

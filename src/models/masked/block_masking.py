"""Block-wise masking of patches."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from src.errors import SettingError


def block_masks(
    uniform: Tensor,
    grid: tuple[int, int],
    *,
    probability: float = 0.5,
    share: tuple[float, float] = (0.1, 0.5),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    smallest: int | None = None,
) -> Tensor:
    """Draws iBOT's masks (Zhou et al., 2021), bool [B, N], True where masked: a crop stays whole, or a random share of
    its patches is masked in BEiT's blocks.

    Exactly int(share * N) patches are masked; if no further block fits, single patches make up the count (the authors'
    code masks fewer). A pure function of its arguments.

    Args:
        uniform: [B, 3], random numbers in [0, 1) that decide whether a crop is masked, the share, and the blocks.
        grid: rows and columns of patches, N in all.
        probability: probability that a crop is masked.
        share: smallest and largest share of masked patches in a masked crop, in [0, 1).
        ratio: smallest and largest ratio of a block's height to its width.
        smallest: least area from which a block's is drawn, in patches; None for iBOT's, a third of the grid's shorter
            side squared.

    Raises:
        SettingError: a probability or share out of range.
    """
    if not 0 <= probability <= 1 or not 0 <= share[0] <= share[1] < 1:
        raise SettingError(
            f"model.mask_probability={probability} must lie in [0, 1] and model.mask_share={list(share)} in [0, 1)"
        )
    least = (min(grid) // 3) ** 2 if smallest is None else smallest
    masks = torch.zeros(len(uniform), grid[0] * grid[1], dtype=torch.bool)
    for mask, (chance, amount, seed) in zip(masks, uniform.tolist(), strict=True):
        if chance < probability:
            count = int((share[0] + amount * (share[1] - share[0])) * len(mask))
            mask[_blocks(grid, count, ratio, least, random.Random(seed))] = True
    return masks


def _blocks(
    grid: tuple[int, int], count: int, ratio: tuple[float, float], smallest: int, draw: random.Random
) -> list[int]:
    """Draws the raster positions of ``count`` masked patches."""
    rows, columns = grid
    masked: set[int] = set()
    while len(masked) < count:
        for _ in range(10):
            area = draw.uniform(smallest, count - len(masked))
            aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
            block = {r * columns + c for r in range(top, top + height) for c in range(left, left + width)} - masked
            if 0 < len(block) <= count - len(masked):
                masked |= block
                break
        else:
            visible = [position for position in range(rows * columns) if position not in masked]
            masked.update(draw.sample(visible, count - len(masked)))
    return sorted(masked)

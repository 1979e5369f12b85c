"""Which patches are hidden, in blocks."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor


def block_masks(
    uniform: Tensor,
    grid: tuple[int, int],
    *,
    probability: float = 0.5,
    share: tuple[float, float] = (0.1, 0.5),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """iBOT's masks (Zhou et al., 2021), bool [B, N], True where hidden: a crop stays whole or loses a random share of
    its patches in BEiT's blocks.

    Exactly int(share * N) patches are hidden; where no further block fits, single ones make up the count (the authors'
    code stops short there). A pure function of its numbers.

    Args:
        uniform: [B, 3] in [0, 1): whether anything is hidden, the share, and the seed of the blocks.
        grid: rows and columns of patches, N in all.
        probability: that a crop is masked.
        share: smallest and largest share that is hidden then, in [0, 1).
        ratio: smallest and largest height over width of a block.

    Raises:
        ValueError: a probability or a share that cannot be.
    """
    if not 0 <= probability <= 1 or not 0 <= share[0] <= share[1] < 1:
        raise ValueError(f"mask probability={probability} must lie in [0, 1] and share={tuple(share)} in [0, 1)")
    masks = torch.zeros(len(uniform), grid[0] * grid[1], dtype=torch.bool)
    for mask, (chance, amount, seed) in zip(masks, uniform.tolist(), strict=True):
        if chance < probability:
            hidden = int((share[0] + amount * (share[1] - share[0])) * len(mask))
            mask[_blocks(grid, hidden, ratio, random.Random(seed))] = True
    return masks


def _blocks(grid: tuple[int, int], hidden: int, ratio: tuple[float, float], draw: random.Random) -> list[int]:
    """The raster positions of ``hidden`` patches."""
    rows, columns = grid
    chosen: set[int] = set()
    smallest = (min(grid) // 3) ** 2
    while len(chosen) < hidden:
        for _ in range(10):
            area = draw.uniform(smallest, hidden - len(chosen))
            shape = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
            height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if height >= rows or width >= columns:
                continue
            top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
            block = {r * columns + c for r in range(top, top + height) for c in range(left, left + width)} - chosen
            if 0 < len(block) <= hidden - len(chosen):
                chosen |= block
                break
        else:
            rest = [position for position in range(rows * columns) if position not in chosen]
            chosen.update(draw.sample(rest, hidden - len(chosen)))
    return sorted(chosen)

"""I-JEPA's masks: a large context block and several smaller target blocks that are cut out of it."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from src.errors import SettingError

_TRIES = 20


class ContextAndTargets(NamedTuple):
    """Positions of patches, counted in raster order and ascending in each block."""

    context: Tensor  # int64 [B, K]
    targets: Tensor  # int64 [B, T, M]


def multi_block_masks(
    seed: float,
    batch: int,
    grid: tuple[int, int],
    *,
    targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_ratio: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_context: int = 10,
) -> ContextAndTargets:
    """Draws I-JEPA's masks (Assran et al., 2023). A pure function of its arguments.

    All images of a batch share the size of the target blocks and that of the context block; the places are each
    image's own. The patches of the target blocks are cut out of the context block. Contexts are then cut to the
    smallest of the batch: their last patches in raster order are left out. As in the authors' code one number sets both
    the area and the aspect ratio of the target blocks, and a block never touches the last row or the last column.

    Args:
        seed: of the draws.
        batch: number of images.
        grid: rows and columns of patches.
        targets: T, number of target blocks of an image; they may overlap.
        target_scale: smallest and largest share of the patches in a target block.
        target_ratio: smallest and largest ratio of a target block's height to its width.
        context_scale: smallest and largest share of the patches in the context block, a square, before it is cut.
        min_context: a context must have more patches. A place with fewer is drawn again; after every 20 failures one
            target block less is cut out.

    Raises:
        SettingError: a number, share or ratio out of range, or a grid of a single row or column.
    """
    for name, (low, high), limit in (
        ("target_scale", target_scale, 1.0),
        ("target_ratio", target_ratio, math.inf),
        ("context_scale", context_scale, 1.0),
    ):
        if not 0 < low <= high <= limit:
            raise SettingError(f"model.{name}={[low, high]} must satisfy 0 < smallest <= largest <= {limit:g}")
    if targets < 1:
        raise SettingError(f"model.targets={targets} must be at least 1")
    if min(grid) < 2:
        raise SettingError(
            f"image_size: I-JEPA cuts blocks out of a grid of {grid[0]}x{grid[1]} patches; it is too small"
        )
    draw = random.Random(seed)
    target_size = _block_size(draw.random(), grid, target_scale, target_ratio)
    context_size = _block_size(draw.random(), grid, context_scale, (1.0, 1.0))
    contexts: list[list[int]] = []
    target_blocks: list[list[list[int]]] = []
    for _ in range(batch):
        blocks = [_block(draw, grid, target_size) for _ in range(targets)]
        contexts.append(_context(draw, grid, context_size, blocks, min_context))
        target_blocks.append(blocks)
    smallest = min(map(len, contexts))
    return ContextAndTargets(
        context=torch.tensor([context[:smallest] for context in contexts]), targets=torch.tensor(target_blocks)
    )


def _block_size(
    uniform: float, grid: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Returns the rows and columns of a block, fewer than the grid's."""
    area = int(grid[0] * grid[1] * (scale[0] + uniform * (scale[1] - scale[0])))
    aspect = ratio[0] + uniform * (ratio[1] - ratio[0])
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(1, height), grid[0] - 1), min(max(1, width), grid[1] - 1)


def _block(draw: random.Random, grid: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Returns the positions of a block at a random place."""
    top, left = draw.randrange(grid[0] - size[0]), draw.randrange(grid[1] - size[1])
    rows, columns = range(top, top + size[0]), range(left, left + size[1])
    return [row * grid[1] + column for row in rows for column in columns]


def _context(
    draw: random.Random, grid: tuple[int, int], size: tuple[int, int], targets: list[list[int]], least: int
) -> list[int]:
    """Returns the positions of a context block without those of the target blocks."""
    least = min(least, size[0] * size[1] - 1)  # a small grid has no larger block
    for cut in range(len(targets), 0, -1):
        taken = {position for block in targets[:cut] for position in block}
        for _ in range(_TRIES):
            context = [position for position in _block(draw, grid, size) if position not in taken]
            if len(context) > least:
                return context
    return _block(draw, grid, size)

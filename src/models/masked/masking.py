"""Masks of patches, and mask tokens in their place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.errors import SettingError


class Masking(NamedTuple):
    """The visible and the masked patches of every sample."""

    keep: Tensor  # int64 [B, V], positions of the visible patches, in random order
    restore: Tensor  # int64 [B, N], index in (visible, masked) of each position in raster order
    mask: Tensor  # float32 [B, N], 1 where masked


def random_masking(batch: int, patches: int, ratio: float, device: torch.device) -> Masking:
    """Masks a random ``ratio`` of the patches of each sample independently; int(patches * (1 - ratio)) stay visible.

    Raises:
        SettingError: no patch would be visible, or none masked.
    """
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        raise SettingError(
            f"model.mask_ratio={ratio} leaves {visible} of {patches} patches visible; at least one must be, and not all"
        )
    shuffle = torch.rand(batch, patches, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = (restore >= visible).float()
    return Masking(keep=shuffle[:, :visible], restore=restore, mask=mask)


def square_masks(
    batch: int, grid: tuple[int, int], square: tuple[int, int], ratio: float, device: torch.device
) -> Tensor:
    """Draws SimMIM's masks (Xie et al., 2021), bool [B, N], True where masked: of the squares of patches that tile the
    grid, ceil(ratio * squares) are masked whole, each image's independently.

    Args:
        grid: rows and columns of patches, N in all.
        square: rows and columns of patches in a square; divide the grid's.
        ratio: share of the squares that is masked.

    Raises:
        SettingError: every square would be masked.
    """
    rows, columns = grid[0] // square[0], grid[1] // square[1]
    count = math.ceil(ratio * rows * columns)
    if count >= rows * columns:
        raise SettingError(
            f"model.mask_ratio={ratio} masks all {count} squares of an image; take a smaller ratio or model.mask_size"
        )
    rank = torch.rand(batch, rows * columns, device=device).argsort(dim=1).argsort(dim=1)
    masks = (rank < count).view(batch, rows, columns)
    return masks.repeat_interleave(square[0], dim=1).repeat_interleave(square[1], dim=2).flatten(1)


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Gathers the tokens at ``positions``: [B, N, D], int64 [B, M] -> [B, M, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def pixel_mask(mask: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Gives every pixel the value of its patch: [B, N] -> [B, 1, height, width] of ``size``, where N = rows * columns
    of ``grid``."""
    height, width = size[0] // grid[0], size[1] // grid[1]
    return mask.view(-1, 1, *grid).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)


@contextmanager
def masked_patches(backbone: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """While active, ``backbone`` replaces the patches where ``mask`` [B, N] is True by ``token`` [1, D], before it adds
    positional embeddings."""

    def replace(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        rows = patches.flatten(1, -2)
        return torch.where(mask.unsqueeze(-1), token.to(rows.dtype), rows).view_as(patches)

    patch_embed: Any = backbone.patch_embed
    handle = patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()

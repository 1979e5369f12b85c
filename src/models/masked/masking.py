"""Masks of patches, and mask tokens in their place."""

from __future__ import annotations

from collections.abc import Iterator
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


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Gathers the tokens at ``positions``: [B, N, D], int64 [B, M] -> [B, M, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def pixel_mask(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Gives every pixel the value of its patch: [B, N] -> [B, 1, height, width] of ``size``, N = rows * columns of
    ``grid``."""
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

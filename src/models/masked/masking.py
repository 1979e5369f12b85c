"""Random masking of patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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

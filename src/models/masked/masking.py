"""Which patches are hidden."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from src.errors import SettingError


class Masking(NamedTuple):
    """A choice of visible patches for every sample."""

    keep: Tensor  # int64 [B, V], the visible patches' positions, in random order
    restore: Tensor  # int64 [B, N], where in (visible, hidden) each position of the raster went
    mask: Tensor  # float32 [B, N], 1 where hidden


def random_masking(batch: int, patches: int, ratio: float, device: torch.device) -> Masking:
    """Hide a random ``ratio`` of the patches of each sample, independently; int(patches * (1 - ratio)) stay visible.

    Raises:
        SettingError: no patch would be visible, or none hidden.
    """
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        raise SettingError(f"mask_ratio={ratio} leaves {visible} of {patches} patches visible: some must be, not all")
    shuffle = torch.rand(batch, patches, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = (restore >= visible).float()
    return Masking(keep=shuffle[:, :visible], restore=restore, mask=mask)


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens at ``positions``: [B, N, D], int64 [B, M] -> [B, M, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

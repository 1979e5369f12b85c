"""Masks of video transformers: which tubelets the encoder does not see, and which tubelets the decoder predicts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from src.errors import SettingError
from src.models.masked.masking import Masking, random_masking

Grid = tuple[int, int, int]
"""Numbers of tubelets in time, rows and columns; tubelets are numbered in this order."""

VideoMasking = Callable[[int, Grid, float, torch.device], Masking]
"""(batch, grid, mask ratio, device) -> masks that leave every clip the same number of visible tubelets."""

DecoderMasking = Callable[[Masking, Grid], Tensor]
"""(encoder's masking, grid) -> int64 [B, M], positions of the tubelets that the decoder predicts."""


def tube_masking(batch: int, grid: Grid, ratio: float, device: torch.device) -> Masking:
    """Masks the same int(ratio * rows * columns) positions at all times (Tong et al., 2022), so that what does not move
    cannot be copied from another frame.

    Raises:
        SettingError: no position would be visible, or none masked.
    """
    positions = grid[1] * grid[2]
    count = int(ratio * positions)
    mask = _random_mask(batch, positions, count, ratio, device)
    return _masking(mask[:, None].expand(-1, grid[0], -1).flatten(1), visible=grid[0] * (positions - count))


def frame_masking(batch: int, grid: Grid, ratio: float, device: torch.device) -> Masking:
    """Masks all positions at int(ratio * times) random times.

    Raises:
        SettingError: no time would be visible, or none masked.
    """
    positions, count = grid[1] * grid[2], int(ratio * grid[0])
    mask = _random_mask(batch, grid[0], count, ratio, device)
    return _masking(mask[:, :, None].expand(-1, -1, positions).flatten(1), visible=positions * (grid[0] - count))


def random_tubelet_masking(batch: int, grid: Grid, ratio: float, device: torch.device) -> Masking:
    """Masks random tubelets, each position and time independently."""
    return random_masking(batch, grid[0] * grid[1] * grid[2], ratio, device)


def masked_tubelets(masking: Masking, grid: Grid) -> Tensor:
    """Returns all tubelets that the encoder does not see, VideoMAE's targets."""
    return masking.restore.argsort(dim=1)[:, masking.keep.shape[1] :]


def running_cell_masking(masking: Masking, grid: Grid) -> Tensor:
    """Returns half of all tubelets, masked or visible, VideoMAE V2's decoder mask (Wang et al., 2023).

    In every cell of 2 x 2 positions two are predicted. They move through the cell with time, in raster order from the
    last position to the first, so that over any four times each position is predicted twice. The first two are random
    for each clip.

    Raises:
        SettingError: the grid is no whole number of cells.
    """
    if grid[1] % 2 or grid[2] % 2:
        raise SettingError(
            f"model.decoder_masking: cells of 2x2 do not divide a grid of {grid[1]}x{grid[2]}; use masked_tubelets"
        )
    device = masking.keep.device
    batch = len(masking.keep)
    time, row, column = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    position_in_cell = (row % 2) * 2 + column % 2
    first = torch.randint(4, (batch, 1), device=device)
    phase = (position_in_cell + time).flatten() + first
    order = (phase % 4 < 2).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : order.shape[1] // 2]


def _random_mask(batch: int, count: int, masked: int, ratio: float, device: torch.device) -> Tensor:
    """Masks ``masked`` of ``count`` positions of each clip: float32 [B, count], 1 where masked."""
    if not 0 < masked < count:
        raise SettingError(f"model.mask_ratio={ratio} masks {masked} of {count}: some must be masked, but not all")
    rank = torch.rand(batch, count, device=device).argsort(dim=1).argsort(dim=1)
    return (rank < masked).float()


def _masking(mask: Tensor, *, visible: int) -> Masking:
    """Converts a mask, float32 [B, N] with 1 where masked and ``visible`` zeros in each row, to a `Masking`."""
    order = mask.argsort(dim=1, stable=True)
    return Masking(keep=order[:, :visible], restore=order.argsort(dim=1), mask=mask)

"""Which tubelets of a clip are hidden, and which of them are predicted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from src.errors import SettingError
from src.models.masked.masking import Masking, random_masking

Grid = tuple[int, int, int]  # tubelets in time, rows and columns; they are counted in this order

VideoMasking = Callable[[int, Grid, float, torch.device], Masking]
"""(batch, grid, share to hide, device) -> as many visible tubelets for every clip."""

Decoded = Callable[[Masking, Grid], Tensor]
"""(masking, grid) -> int64 [B, M], the places of what is predicted."""


def tubes(batch: int, grid: Grid, ratio: float, device: torch.device) -> Masking:
    """The same places hidden at all times (Tong et al., 2022), int(ratio * places) of them: nothing that stands still
    can be copied from another frame.

    Raises:
        SettingError: no place would be visible, or none hidden.
    """
    places = grid[1] * grid[2]
    count = int(ratio * places)
    hidden = _hidden(batch, places, count, ratio, device)
    return _masking(hidden[:, None].expand(-1, grid[0], -1).flatten(1), visible=grid[0] * (places - count))


def frames(batch: int, grid: Grid, ratio: float, device: torch.device) -> Masking:
    """All places hidden at the same times, int(ratio * times) of them."""
    places, count = grid[1] * grid[2], int(ratio * grid[0])
    hidden = _hidden(batch, grid[0], count, ratio, device)
    return _masking(hidden[:, :, None].expand(-1, -1, places).flatten(1), visible=places * (grid[0] - count))


def anywhere(batch: int, grid: Grid, ratio: float, device: torch.device) -> Masking:
    """Cubes hidden wherever they are."""
    return random_masking(batch, grid[0] * grid[1] * grid[2], ratio, device)


def hidden_cubes(masking: Masking, grid: Grid) -> Tensor:
    """All that is hidden."""
    return masking.restore.argsort(dim=1)[:, masking.keep.shape[1] :]


def running_cell_masking(masking: Masking, grid: Grid) -> Tensor:
    """Half of all tubelets, hidden or not (Wang et al., 2023): in every cell of 2 x 2 places two, which run round the cell
    from time to time, so that over any four times each place is predicted twice. Where the run begins is random.

    Raises:
        SettingError: the places are no whole number of cells.
    """
    if grid[1] % 2 or grid[2] % 2:
        raise SettingError(f"model.decoded: running cells of 2x2 do not fill {grid[1]}x{grid[2]} places")
    device = masking.keep.device
    batch = len(masking.keep)
    time, row, column = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    place = (row % 2) * 2 + column % 2
    begin = torch.randint(4, (batch, 1), device=device)
    skipped = (place - time).flatten() + begin
    order = (skipped % 4 < 2).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : order.shape[1] // 2]


def _hidden(batch: int, count: int, hidden: int, ratio: float, device: torch.device) -> Tensor:
    """Which ``hidden`` of ``count`` are, for each clip: float32 [B, count]."""
    if not 0 < hidden < count:
        raise SettingError(f"model.mask_ratio={ratio} hides {hidden} of {count}: some must be, not all")
    rank = torch.rand(batch, count, device=device).argsort(dim=1).argsort(dim=1)
    return (rank < hidden).float()


def _masking(mask: Tensor, *, visible: int) -> Masking:
    """Of float32 [B, N], 1 where hidden, with as many visible ones in each row."""
    order = mask.argsort(dim=1, stable=True)
    return Masking(keep=order[:, :visible], restore=order.argsort(dim=1), mask=mask)

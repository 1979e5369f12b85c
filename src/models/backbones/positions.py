"""Fixed position tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.errors import SettingError


def sincos_2d(dim: int, grid: tuple[int, int], *, prefix_tokens: int = 0) -> Tensor:
    """The 2D sine-cosine table of MAE: float32 [prefix_tokens + rows * columns, dim], prefix rows zero.

    The first half of the channels codes the column, the second the row; each half is the sines, then the cosines, of
    the coordinate times 10000^(-k / (dim / 4)), k = 0 ... dim / 4 - 1.

    Raises:
        SettingError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise SettingError(f"a 2D sine-cosine table needs a width that is a multiple of 4, not {dim}")
    frequency = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    table = torch.cat(halves, dim=1).float()
    return torch.cat([table.new_zeros(prefix_tokens, dim), table])


def fixed_positions(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """`sincos_2d` for a ViT with a class token, [1, 1 + rows * columns, dim]."""
    # a parameter without gradient, not a buffer: timm's checkpoints hold the table under this name
    return nn.Parameter(sincos_2d(dim, grid, prefix_tokens=1).unsqueeze(0), requires_grad=False)

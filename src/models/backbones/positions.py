"""Positional embeddings: fixed sine-cosine tables, and interpolation for images of other sizes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from timm.layers import Format
from torch import Tensor, nn

from src.errors import SettingError

M = TypeVar("M", bound=nn.Module)


def accept_any_image_size(backbone: M) -> M:
    """Makes ``backbone`` take images of other sizes than its own, and returns it.

    A timm ViT then interpolates its positional embeddings, as if built with ``dynamic_img_size``; a ConvNet takes any
    size anyway. Methods call this, so that recipes need no option that only a ViT has. An image that is not a whole
    number of patches raises a SettingError.
    """
    if hasattr(backbone, "dynamic_img_size"):
        vit: Any = backbone
        vit.dynamic_img_size = True
        vit.patch_embed.strict_img_size = False
        vit.patch_embed.flatten = False
        vit.patch_embed.output_fmt = Format.NHWC
        vit.patch_embed.register_forward_pre_hook(_whole_patches)
    return backbone


def _whole_patches(patch_embed: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    size, patch = tuple(arguments[0].shape[-2:]), tuple(patch_embed.patch_size)  # type: ignore[arg-type]
    if size[0] % patch[0] or size[1] % patch[1]:
        raise SettingError(
            f"image_size, local_image_size: a view of {size[0]}x{size[1]} pixels is not a whole number of patches of "
            f"{patch[0]}x{patch[1]} (backbone.patch_size)"
        )


def sincos_2d(dim: int, grid: tuple[int, int], *, prefix_tokens: int = 0) -> Tensor:
    """MAE's 2D sine-cosine positional embedding: float32 [prefix_tokens + rows * columns, dim], zero for prefix tokens.

    The first half of the channels encodes the column, the second the row; each half has the sines, then the cosines, of
    the coordinate times 10000^(-k / (dim / 4)), k = 0 ... dim / 4 - 1.

    Raises:
        SettingError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise SettingError(f"backbone: a 2D sine-cosine embedding needs a width that is a multiple of 4, not {dim}")
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
    """`sincos_2d` for a ViT with a class token, without gradient: [1, 1 + rows * columns, dim]."""
    # a parameter, not a buffer, as in timm's checkpoints
    return nn.Parameter(sincos_2d(dim, grid, prefix_tokens=1).unsqueeze(0), requires_grad=False)

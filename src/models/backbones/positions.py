"""Positions of patches: fixed tables, and images of other sizes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from timm.layers import Format
from torch import Tensor, nn

from src.errors import SettingError

M = TypeVar("M", bound=nn.Module)


def accept_any_image_size(backbone: M) -> M:
    """``backbone`` itself, made to take images of other sizes than its own, of whole patches: a ViT of timm
    interpolates its positions, as it does where it is built with ``dynamic_img_size``. A ConvNet does so anyway.

    A method says so, not a recipe, because the method knows its views, and only a ViT would know the option. An image
    that is no whole number of patches is then a SettingError.
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
            f"image_size, local_image_size: a view of {size[0]}x{size[1]} pixels is no whole number of patches of "
            f"{patch[0]}x{patch[1]} (backbone.patch_size)"
        )


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

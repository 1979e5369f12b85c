"""Positional embeddings: fixed sine-cosine tables, and interpolation for images of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from timm.layers import Format
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import SettingError
from src.models.backbones.layout import check_accepts_any_size
from src.models.functional import at_least_float32

M = TypeVar("M", bound=nn.Module)


PositionInterpolation = Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor]
"""(table of the patches [1, rows * columns, D], its rows and columns, new rows and columns) -> [1, new patches, D]."""


def accept_any_image_size(backbone: M, *, interpolation: PositionInterpolation | None = None, needed: bool = True) -> M:
    """Makes ``backbone`` take images of other sizes than its own, and returns it.

    A timm ViT then interpolates its positional embeddings, as if built with ``dynamic_img_size``; a ConvNet takes any
    size anyway. Methods call this, so that recipes need no option that only a ViT has. An image that is not a whole
    number of patches raises a SettingError.

    Args:
        backbone: any timm model; changed in place.
        interpolation: of a ViT's positional embeddings, as the code of the method's authors has it:
            `interpolated_positions` or `dino_positions`; None for timm's, which is antialiased. For DINO's local crops
            the tables differ by 81 % of their norm at initialization.
        needed: refuse a model that takes images of its own size alone; False leaves it as it is.

    Raises:
        SettingError: see ``needed``.
    """
    if isinstance(backbone, VisionTransformer | Eva):
        vit: Any = backbone
        vit.dynamic_img_size = True
        vit.patch_embed.strict_img_size = False
        vit.patch_embed.flatten = False
        vit.patch_embed.output_fmt = Format.NHWC
        vit.patch_embed.register_forward_pre_hook(_whole_patches)
        is_plain = type(vit)._pos_embed is VisionTransformer._pos_embed
        if interpolation is not None and vit.pos_embed is not None and is_plain:
            vit._pos_embed = MethodType(partial(_add_positions, interpolation), vit)
    if needed:
        check_accepts_any_size(backbone)
    return backbone


def interpolated_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolates positional embeddings for another number of patches: bicubic, without antialiasing, as the code of
    MAE, ViTDet and their followers does; [1, rows * columns, D] -> [1, new rows * new columns, D].

    Args:
        table: of the patches alone.
        old, new: rows and columns.
    """
    if old == new:
        return table
    return _bicubic(table, old, size=new)


def dino_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolates positional embeddings for another number of patches as the code of DINO and iBOT does: bicubic,
    without antialiasing, [1, rows * columns, D] -> [1, new rows * new columns, D].

    The authors add 0.1 to the new size, against rounding, and sample at distances of old / (new + 0.1). Returns the
    table itself where the size is the same.

    Args:
        table: of the patches alone.
        old, new: rows and columns.
    """
    if old == new:
        return table
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    return _bicubic(table, old, scale_factor=scale)


def _bicubic(table: Tensor, old: tuple[int, int], **target: Any) -> Tensor:
    """target: ``size`` or ``scale_factor`` of ``interpolate``."""
    grid = at_least_float32(table).unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(grid, mode="bicubic", **target).flatten(2).transpose(1, 2).to(table.dtype)


def position_count(backbone: nn.Module) -> int:
    """The number of prefix tokens that have positional embeddings."""
    return 0 if getattr(backbone, "no_embed_class", False) else int(getattr(backbone, "num_prefix_tokens", 0))


def with_positions(vit: Any, patches: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens of a ViT with their positional embeddings: class token and registers [B, P, D], and patches [B, N, D].

    Args:
        vit: has the class token and the registers.
        patches: embedded, [B, N, D].
        positions: [1, `position_count` + N, D]; None for a ViT without.
    """
    tokens = [token.expand(len(patches), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    prefix = torch.cat(tokens, dim=1) if tokens else patches[:, :0]
    if positions is not None:
        count = position_count(vit)
        patches = patches + positions[:, count:]
        prefix = prefix + positions[:, :count] if count else prefix
    return prefix, patches


def _add_positions(interpolation: PositionInterpolation, vit: Any, patches: Tensor) -> Tensor:
    """timm's ``_pos_embed`` with another interpolation: [B, rows, columns, D] -> [B, prefix tokens + patches, D]."""
    count, grid = position_count(vit), (patches.shape[1], patches.shape[2])
    of_patches = interpolation(vit.pos_embed[:, count:], vit.patch_embed.grid_size, grid)
    positions = torch.cat([vit.pos_embed[:, :count], of_patches], dim=1)
    return vit.pos_drop(torch.cat(with_positions(vit, patches.flatten(1, 2), positions), dim=1))


def _whole_patches(patch_embed: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    # of a convolutional stem: its stride times the size of a patch in its output
    size, patch = tuple(arguments[0].shape[-2:]), tuple(patch_embed.feat_ratio(as_scalar=False))  # type: ignore[operator]
    if size[0] % patch[0] or size[1] % patch[1]:
        raise SettingError(
            f"image_size, local_image_size: a view of {size[0]}x{size[1]} pixels is not a whole number of patches of "
            f"{patch[0]}x{patch[1]} (backbone.patch_size)"
        )


def sincos_2d(dim: int, grid: tuple[int, int], *, prefix_tokens: int = 0, rows_first: bool = False) -> Tensor:
    """MAE's 2D sine-cosine positional embedding: float32 [prefix_tokens + rows * columns, dim], zero for prefix tokens.

    The first half of the channels encodes the column, the second the row (``rows_first``: the other way round, as in
    MoCo v3's code); each half has the sines, then the cosines, of the coordinate times 10000^(-k / (dim / 4)),
    k = 0 ... dim / 4 - 1.

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
    for coordinate in (rows, columns) if rows_first else (columns, rows):
        angle = coordinate.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    table = torch.cat(halves, dim=1).float()
    return torch.cat([table.new_zeros(prefix_tokens, dim), table])


def fixed_positions(
    dim: int, grid: tuple[int, int], *, prefix_tokens: int = 1, rows_first: bool = False
) -> nn.Parameter:
    """`sincos_2d` for a ViT, without gradient: [1, prefix_tokens + rows * columns, dim]."""
    # a parameter, not a buffer, as in timm's checkpoints
    table = sincos_2d(dim, grid, prefix_tokens=prefix_tokens, rows_first=rows_first)
    return nn.Parameter(table.unsqueeze(0), requires_grad=False)

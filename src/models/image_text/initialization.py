"""The random weights that the authors of CLIP, LaCLIP and SigLIP give an image tower, where timm gives a ViT others.

A recipe wraps its backbone in one of these functions. Text towers initialize themselves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import lecun_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.models.layers.initialization import initialize_as_big_vision

log = logging.getLogger(__name__)


@torch.no_grad()
def initialize_as_clip(backbone: nn.Module) -> nn.Module:
    """Initializes a ViT of timm as the code of CLIP does (Radford et al., 2021): positions and class token with a
    standard deviation of width^-0.5, queries, keys and values as `nn.MultiheadAttention`, which draws them from one
    Xavier distribution, everything else as PyTorch's layers.

    Args:
        backbone: any timm model; one that is no ViT stays as it is. Pretrained weights are loaded afterwards.

    Returns:
        ``backbone``.
    """
    if not _is_vit(backbone):
        return backbone
    vit: Any = backbone
    _reset_positions_and_patches(vit, lambda table: nn.init.normal_(table, std=vit.embed_dim**-0.5))
    for block in vit.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        block.attn.proj.reset_parameters()
        for layer in (block.attn.qkv, block.attn.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        block.mlp.fc1.reset_parameters()
        block.mlp.fc2.reset_parameters()
    return backbone


@torch.no_grad()
def initialize_as_laclip(backbone: nn.Module) -> nn.Module:
    """Initializes a ViT of timm as the code of LaCLIP does (Fan et al., 2023): its blocks replace those of timm 0.5.4
    and stay as PyTorch's layers initialize themselves; positions and class token are drawn from a truncated normal
    distribution with a standard deviation of 0.02."""
    if not _is_vit(backbone):
        return backbone
    vit: Any = backbone
    _reset_positions_and_patches(vit, lambda table: nn.init.trunc_normal_(table, std=0.02))
    for layer in vit.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return backbone


@torch.no_grad()
def initialize_as_siglip(backbone: nn.Module) -> nn.Module:
    """Initializes a ViT of timm as big_vision does, the code of SigLIP (Zhai et al., 2023), see
    `initialize_as_big_vision`: the patch embedding by LeCun's rule, positions with a standard deviation of width^-0.5,
    the query of the attention-pooling head by Xavier's rule for a matrix [1, width]."""
    if not _is_vit(backbone):
        return backbone
    vit: Any = backbone
    lecun_normal_(vit.patch_embed.proj.weight)
    if vit.patch_embed.proj.bias is not None:
        nn.init.zeros_(vit.patch_embed.proj.bias)
    if vit.pos_embed is not None:
        nn.init.normal_(vit.pos_embed, std=vit.embed_dim**-0.5)
    if vit.cls_token is not None:
        nn.init.zeros_(vit.cls_token)
    for block in vit.blocks:
        attention = [(block.attn.qkv, 3), (block.attn.proj, 1)]
        initialize_as_big_vision(attention=attention, mlp=[block.mlp.fc1, block.mlp.fc2])
    if getattr(vit, "attn_pool", None) is not None:
        pool = vit.attn_pool
        limit = math.sqrt(6 / (1 + vit.embed_dim))
        nn.init.uniform_(pool.latent, -limit, limit)
        attention = [(pool.q, 1), (pool.kv, 2), (pool.proj, 1)]
        initialize_as_big_vision(attention=attention, mlp=[pool.mlp.fc1, pool.mlp.fc2])
    return backbone


def _is_vit(backbone: nn.Module) -> bool:
    if isinstance(backbone, VisionTransformer):
        return True
    log.info("image tower: a %s is no ViT of timm and keeps timm's initialization", type(backbone).__name__)
    return False


def _reset_positions_and_patches(vit: Any, draw: Callable[[Tensor], object]) -> None:
    for table in (vit.pos_embed, vit.cls_token):
        if table is not None:
            draw(table)
    vit.patch_embed.proj.reset_parameters()

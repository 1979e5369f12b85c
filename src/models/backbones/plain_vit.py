"""The parts of timm's ViT in their order, and a check that it has no others: for methods that run them one by one, such
as MAE, which encodes a part of the patches."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.layout import check_heads_and_rates, explained
from src.models.backbones.positions import with_positions


def check_plain_vit(
    backbone: nn.Module, method: str, *, embed: type[nn.Module] = PatchEmbed, square_patches: bool = False
) -> None:
    """Checks that ``backbone`` computes what `embed`, ``norm_pre``, ``blocks`` and ``norm`` compute one after another.

    Class tokens, registers, a norm before the blocks and positions without those of prefix tokens are supported; rotary
    and relative positions, distillation tokens, dropped patches and convolutional stems are not.

    Args:
        backbone: any model.
        method: its name, for the message.
        embed: class of the patch embedding: `PatchEmbed` for images, `TubeletEmbed` for clips.
        square_patches: patches must be square.

    Raises:
        SettingError: it does not; the message names what the backbone has.
    """
    needs = f"backbone.model_name: {method} needs a plain timm ViT"
    if not isinstance(backbone, VisionTransformer):
        raise SettingError(f"{needs} (VisionTransformer), not a {type(backbone).__name__}")
    check_heads_and_rates(backbone)
    own: Any = type(backbone)
    if any(getattr(own, name) is not getattr(VisionTransformer, name) for name in ("_pos_embed", "forward_features")):
        raise SettingError(f"{needs}, and {own.__name__} has tokens of its own, such as one for distillation")
    if not isinstance(backbone.patch_embed, embed):
        raise SettingError(
            f"{needs} whose patches are embedded one by one ({embed.__name__}), not by a "
            f"{type(backbone.patch_embed).__name__}"
        )
    if not isinstance(backbone.patch_drop, nn.Identity):
        raise SettingError(f"backbone.patch_drop_rate: {method} chooses the patches itself; set it to 0")
    patch: Any = backbone.patch_embed.patch_size
    if square_patches and patch[0] != patch[1]:
        raise SettingError(f"backbone.patch_size: {method} needs square patches, not {patch[0]}x{patch[1]}")


def embed_patches(vit: VisionTransformer, image: Tensor, *, positions: bool = True) -> tuple[Tensor, Tensor]:
    """Embeds images or clips with their positions: class token and registers [B, P, D], and patches [B, N, D].

    Args:
        vit: see `check_plain_vit`.
        image: or clips, of the size that the ViT was built for.
        positions: add the positional embedding.

    Raises:
        SettingError: the images have another size than the ViT was built for.
    """
    with explained(vit, image):
        patches = vit.patch_embed(image)
    patches = patches.flatten(1, -2)  # rows and columns, where the ViT takes images of any size
    prefix, patches = with_positions(vit, patches, vit.pos_embed if positions else None)
    return vit.pos_drop(prefix), vit.pos_drop(patches)


def encode_tokens(vit: VisionTransformer, prefix: Tensor, patches: Tensor) -> Tensor:
    """Encodes embedded tokens: [B, P, D] and some of the patches [B, V, D] -> [B, P + V, D]."""
    return vit.norm(vit.blocks(vit.norm_pre(torch.cat([prefix, patches], dim=1))))

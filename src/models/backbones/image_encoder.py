"""The one feature interface: every encoder that is evaluated, exported or fine-tuned answers through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import SettingError


@dataclass(frozen=True)
class Features:
    """What an encoder says of a batch of images, or of videos."""

    embedding: Tensor  # [B, D], one vector an image
    patches: Tensor  # [B, N, D], one vector a position, raster order
    grid: tuple[int, ...]  # rows and columns of the positions, times before them of a video; N is their product
    deep: Tensor | None = None  # [B, L, D], class tokens after each of the last L blocks, where they are asked for


Pool = Callable[[Tensor, Tensor], Tensor]


def cls_token(prefix: Tensor, patches: Tensor) -> Tensor:
    """The class token: [B, P, D], [B, N, D] -> [B, D].

    Raises:
        SettingError: the backbone has no class token.
    """
    if prefix.shape[1] == 0:
        raise SettingError("this backbone has no class token to pool by: use mean_patch")
    return prefix[:, 0]


def mean_patch(prefix: Tensor, patches: Tensor) -> Tensor:
    """The mean of all positions: [B, P, D], [B, N, D] -> [B, D]. On a ConvNet this is global average pooling."""
    return patches.mean(dim=1)


def cls_token_or_mean(prefix: Tensor, patches: Tensor) -> Tensor:
    """The class token, or the mean of all positions of a backbone that has none, such as a ConvNet."""
    return cls_token(prefix, patches) if prefix.shape[1] else mean_patch(prefix, patches)


def attention_pool(backbone: nn.Module) -> Pool:
    """What a ViT of timm with ``global_pool: map`` has for a pool: a learned query attends to all tokens.

    Raises:
        SettingError: the backbone has none.
    """
    if getattr(backbone, "attn_pool", None) is None:
        raise SettingError("this backbone has no attention to pool by: backbone.global_pool=map makes one")
    head: nn.Module = backbone.attn_pool  # type: ignore[assignment]
    return lambda prefix, patches: head(torch.cat([prefix, patches], dim=1))


class ImageEncoder(nn.Module):
    """A timm backbone seen through `Features`.

    Args:
        backbone: any timm model with ``forward_features``: tokens [B, P + N, D], or a map [B, D, H, W].
        pool: makes the embedding of the prefix tokens and the patches.

    Attributes:
        deep: of how many of the last blocks `Features.deep` is wanted; of a backbone with a class token.
    """

    deep: int = 0

    def __init__(self, backbone: nn.Module, pool: Pool = mean_patch) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = pool

    @property
    def dim(self) -> int:
        """D, the width of embedding and patches."""
        return int(self.backbone.num_features)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Features:
        """image: [B, 3, H, W], normalized."""
        if self.deep and getattr(self.backbone, "cls_token", None) is not None:
            output, deep = self._deep(image)
        else:
            output, deep = self.backbone.forward_features(image), None  # type: ignore[operator]
        if output.ndim == 4:
            rows, columns = output.shape[-2:]
            patches = output.flatten(2).transpose(1, 2)
            prefix = patches[:, :0]
        else:
            prefix_tokens = int(self.backbone.num_prefix_tokens)  # type: ignore[arg-type]
            prefix, patches = output[:, :prefix_tokens], output[:, prefix_tokens:]
            rows, columns = self.backbone.patch_embed.dynamic_feat_size(image.shape[-2:])  # type: ignore[union-attr,operator]
        return Features(self.pool(prefix, patches), patches, (rows, columns), deep)

    def _deep(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the class tokens after each of the last blocks, all through the final norm as in DINO."""
        vit: Any = self.backbone
        output, found = vit.forward_intermediates(
            image, indices=min(self.deep, len(vit.blocks)), return_prefix_tokens=True, norm=True, output_fmt="NLC"
        )
        return output, torch.stack([prefix[:, 0] for _, prefix in found], dim=1)

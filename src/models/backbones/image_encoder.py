"""The encoder of images: a timm backbone and the pooling of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.encoder import Encoder, Features
from src.models.backbones.layout import check_image_backbone, explained, split_features

Pool = Callable[[Tensor, Tensor], Tensor]
"""Makes the embedding [B, D] of the prefix tokens [B, P, D] (class token, registers) and the patches [B, N, D]."""


def cls_token(prefix: Tensor, patches: Tensor) -> Tensor:
    """The class token: [B, P, D], [B, N, D] -> [B, D].

    Raises:
        SettingError: the backbone has no class token.
    """
    if prefix.shape[1] == 0:
        raise SettingError("model.pool: this backbone has no class token; use pool=mean_patch")
    return prefix[:, 0]


def mean_patch(prefix: Tensor, patches: Tensor) -> Tensor:
    """The mean of all patches: [B, P, D], [B, N, D] -> [B, D]. On a ConvNet this is global average pooling."""
    return patches.mean(dim=1)


def cls_token_or_mean(prefix: Tensor, patches: Tensor) -> Tensor:
    """The class token, or the mean of all patches if the backbone has no class token, such as a ConvNet."""
    return cls_token(prefix, patches) if prefix.shape[1] else mean_patch(prefix, patches)


def attention_pool(backbone: nn.Module) -> Pool:
    """timm's attention-pooling head (``global_pool: map``): a learned query attends to all tokens.

    Raises:
        SettingError: the backbone has no such head.
    """
    if getattr(backbone, "attn_pool", None) is None:
        raise SettingError("this backbone has no attention-pooling head: set backbone.global_pool=map")
    head: nn.Module = backbone.attn_pool  # type: ignore[assignment]
    return lambda prefix, patches: head(torch.cat([prefix, patches], dim=1))


class ImageEncoder(Encoder):
    """The `Encoder` of images, adapted from a timm backbone.

    Args:
        backbone: any timm model whose features are tokens or one map, see `split_features`.
        pool: makes the embedding of the prefix tokens and the patches.

    Raises:
        SettingError: the model's features are something else; in a forward pass, images of a size it does not take.
    """

    def __init__(self, backbone: nn.Module, pool: Pool = mean_patch) -> None:
        super().__init__()
        self.check_backbone(backbone)
        self.backbone = backbone
        self.pool = pool

    @property
    def dim(self) -> int:
        return int(self.backbone.num_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Features:
        """x: images [B, 3, H, W], normalized."""
        backbone, size = self.backbone, (x.shape[-2], x.shape[-1])
        class_tokens = None
        with explained(backbone, x):
            if self.last_blocks and _has_class_token(backbone):
                output, class_tokens = self._with_class_tokens(x)
            else:
                output = backbone.forward_features(x)  # type: ignore[operator]
        prefix, patches, grid = split_features(backbone, output, size)
        return Features(self.pool(prefix, patches), patches, grid, class_tokens)

    @staticmethod
    def check_backbone(backbone: nn.Module) -> None:
        """
        Raises:
            SettingError: the encoder cannot read the backbone's features.
        """
        check_image_backbone(backbone)

    def _with_class_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the class tokens after each of the last blocks, all through the final norm as in DINO."""
        vit: Any = self.backbone
        output, blocks = vit.forward_intermediates(
            x, indices=min(self.last_blocks, len(vit.blocks)), return_prefix_tokens=True, norm=True, output_fmt="NLC"
        )
        return output, torch.stack([prefix[:, 0] for _, prefix in blocks], dim=1)


def _has_class_token(backbone: nn.Module) -> bool:
    """True for a network whose blocks all have a class token."""
    return isinstance(backbone, VisionTransformer | Eva) and backbone.cls_token is not None

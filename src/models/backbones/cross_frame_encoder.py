"""X-CLIP's video encoder: an image ViT that encodes frames and exchanges messages between them."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.encoder import Features
from src.models.backbones.image_encoder import ImageEncoder, cls_token
from src.models.layers.cross_frame_attention import CrossFrameAttention


class CrossFrameEncoder(ImageEncoder):
    """Encodes each frame of a clip with the ViT; in every block the frames exchange information by cross-frame
    attention. The embedding is the mean of the frames' class tokens.

    Args:
        backbone: a timm ViT with a class token.
        cross_frame_attention: False encodes each frame on its own.

    Raises:
        SettingError: the backbone is no ViT with a class token.
    """

    def __init__(self, backbone: VisionTransformer, *, cross_frame_attention: bool = True) -> None:
        super().__init__(backbone, cls_token)
        if not isinstance(backbone, VisionTransformer) or backbone.cls_token is None:
            raise SettingError("backbone: X-CLIP needs a ViT with a class token")
        blocks: Any = backbone.blocks
        layers = [CrossFrameAttention(backbone.embed_dim, block.attn.num_heads) for block in blocks]
        self.cross_frame_attention = nn.ModuleList(layers) if cross_frame_attention else None

    def tokens(self, video: Tensor) -> Tensor:
        """Computes the last block's output before the norm: [B, T, 3, H, W] -> [B, T, P + N, D]."""
        vit: Any = self.backbone
        batch_and_frames = video.shape[:2]
        x = vit.patch_embed(video.flatten(0, 1))
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        for number, block in enumerate(vit.blocks):
            if self.cross_frame_attention is None:
                x = block(x)
                continue
            class_tokens = x[:, 0].unflatten(0, batch_and_frames)
            message = self.cross_frame_attention[number](class_tokens).flatten(0, 1)
            # the block's attention reads the message token; its MLP treats each token alone, so that removing the
            # message after the block equals removing it after the attention
            x = block(torch.cat([x, message[:, None]], dim=1))[:, :-1]
        return x.unflatten(0, batch_and_frames)

    def frame_features(self, tokens: Tensor) -> Tensor:
        """Returns the normalized class token of each frame: [B, T, P + N, D] -> [B, T, D]."""
        return self.backbone.norm(tokens[:, :, 0])  # type: ignore[operator]

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T, P + N, D] -> [B, T, N, D]."""
        return tokens[:, :, self.backbone.num_prefix_tokens :]

    def embedding(self, tokens: Tensor) -> Tensor:
        """Returns the mean of the frame features: [B, T, P + N, D] -> [B, D]."""
        return self.frame_features(tokens).mean(dim=1)

    def forward(self, x: Tensor) -> Features:
        """x: clips [B, T, 3, H, W], normalized."""
        tokens = self.tokens(x)
        patches = self.backbone.norm(self.patch_tokens(tokens)).flatten(1, 2)  # type: ignore[operator]
        rows, columns = self.backbone.patch_embed.grid_size  # type: ignore[union-attr,misc]
        return Features(embedding=self.embedding(tokens), patches=patches, grid=(x.shape[1], rows, columns))

"""Encoders of clips: a backbone that reads clips, or one of images that reads them frame by frame."""

from __future__ import annotations

from torch import Tensor, nn

from src.models.backbones.encoder import Features
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.backbones.video_vit import TubeletEmbed


class VideoEncoder(ImageEncoder):
    """The encoder of clips with a backbone that reads clips; its embedding is the mean of all positions.

    Args:
        backbone: a ViT with a `TubeletEmbed`, or a ConvNet whose map is [B, D, T, H, W].
        pool: see `ImageEncoder`.
    """

    @staticmethod
    def check_backbone(backbone: nn.Module) -> None:
        pass  # only this project's own backbones read clips

    def forward(self, x: Tensor) -> Features:
        """x: clips [B, T, 3, H, W], normalized."""
        output = self.backbone.forward_features(x)  # type: ignore[operator]
        if output.ndim == 5:
            patches, grid = output.flatten(2).transpose(1, 2), tuple(output.shape[2:])
        else:
            patches, grid = output, tuple(self.backbone.patch_embed.grid)  # type: ignore[union-attr,arg-type]
        return Features(embedding=self.pool(patches[:, :0], patches), patches=patches, grid=grid)


class FrameEncoder(ImageEncoder):
    """The encoder of clips with a backbone of images: it reads each frame, and averages their embeddings."""

    def forward(self, x: Tensor) -> Features:
        """x: clips [B, T, 3, H, W], normalized."""
        batch, frames = x.shape[:2]
        features = super().forward(x.flatten(0, 1))
        return Features(
            embedding=features.embedding.unflatten(0, (batch, frames)).mean(dim=1),
            patches=features.patches.reshape(batch, -1, features.patches.shape[-1]),
            grid=(frames, *features.grid),
        )


def reads_clips(backbone: nn.Module) -> bool:
    """True for a backbone that takes clips [B, T, 3, H, W], False for one that takes images."""
    return bool(getattr(backbone, "reads_clips", False)) or isinstance(
        getattr(backbone, "patch_embed", None), TubeletEmbed
    )


def clip_encoder(backbone: nn.Module, pool: Pool = mean_patch) -> ImageEncoder:
    """The encoder of clips for a backbone that reads clips or images."""
    return VideoEncoder(backbone, pool) if reads_clips(backbone) else FrameEncoder(backbone, pool)

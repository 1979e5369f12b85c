"""Raw pixels as features: the baseline of every evaluation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import SettingError
from src.models.backbones.encoder import Features


class PixelEncoder(nn.Module):
    """An encoder without parameters: resizes an image, or each frame of a video, by area averaging and flattens it.

    Args:
        size: side of the small image in pixels; a smaller image is enlarged by repetition.
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        if size < 1:
            raise SettingError(f"PixelEncoder: size must be at least 1, got {size}")
        self.size = size

    @property
    def dim(self) -> int:
        """Width D of the embedding of an image."""
        return 3 * self.size**2

    def forward(self, image: Tensor) -> Features:
        """Computes embedding [B, 3 * size * size] and patches [B, size * size, 3] of images [B, 3, H, W]; of videos
        [B, T, 3, H, W] these are T times as long."""
        frames = image.shape[1:-3]
        small = F.adaptive_avg_pool2d(image.flatten(0, -4), self.size)
        pixels = small.flatten(2).transpose(1, 2).reshape(len(image), -1, 3)
        return Features(embedding=small.reshape(len(image), -1), patches=pixels, grid=(*frames, self.size, self.size))

"""The floor under every evaluation: raw pixels, through the same code."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.backbones.encoder import Features


class PixelEncoder(nn.Module):
    """An encoder without parameters: the image, or each frame of a video, shrunk by area averaging and flattened.

    Args:
        size: side in pixels of what is compared; an image smaller than that is enlarged by repetition.
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"PixelEncoder: size must be at least 1, got {size}")
        self.size = size

    @property
    def dim(self) -> int:
        """D of the embedding of an image."""
        return 3 * self.size**2

    def forward(self, image: Tensor) -> Features:
        """image: [B, 3, H, W] -> embedding [B, 3 * size * size], patches [B, size * size, 3]; of a video
        [B, T, 3, H, W] as much for each of its T frames."""
        frames = image.shape[1:-3]
        small = F.adaptive_avg_pool2d(image.flatten(0, -4), self.size)
        pixels = small.flatten(2).transpose(1, 2).reshape(len(image), -1, 3)
        return Features(embedding=small.reshape(len(image), -1), patches=pixels, grid=(*frames, self.size, self.size))

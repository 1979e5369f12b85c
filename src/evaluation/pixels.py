"""The floor under every evaluation: raw pixels, through the same code."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.backbones.image_encoder import Features


class PixelEncoder(nn.Module):
    """An encoder without parameters: the image, shrunk by area averaging and flattened.

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
        """D of the embedding."""
        return 3 * self.size**2

    def forward(self, image: Tensor) -> Features:
        """image: [B, 3, H, W] -> embedding [B, 3 * size * size], patches [B, size * size, 3]."""
        small = F.adaptive_avg_pool2d(image, self.size)
        return Features(
            embedding=small.flatten(1), patches=small.flatten(2).transpose(1, 2), grid=(self.size, self.size)
        )

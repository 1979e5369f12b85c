"""GMML's and SiT's head on patches: reconstructs the pixels of each patch from its token."""

from __future__ import annotations

from torch import Tensor, nn

from src.models.layers.initialization import initialize_linear_layers


class PixelHead(nn.Module):
    """Three linear layers, each with a GELU after it, and a transposed convolution from a token to its patch.

    Args:
        dim: width of the tokens.
        patch_size: height and width of a patch.
        channels: of the image.
    """

    def __init__(self, dim: int, patch_size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(dim, dim), nn.GELU())])
        initialize_linear_layers(self.mlp)
        self.to_pixels = nn.ConvTranspose2d(dim, channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, rows * columns, dim], rows and columns -> [B, channels, H, W]."""
        return self.to_pixels(self.mlp(patches).transpose(1, 2).unflatten(2, grid))

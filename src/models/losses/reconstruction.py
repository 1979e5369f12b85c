"""The loss on reconstructed pixels, and the patches it compares."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from src.errors import SettingError
from src.models.functional import at_least_float32


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches: [B, C, H, W] -> [B, N, P * P * C], in raster order, each laid out (row, column,
    channel).

    Raises:
        SettingError: H or W is not a multiple of the patch size.
    """
    if image.shape[-2] % patch_size or image.shape[-1] % patch_size:
        raise SettingError(
            f"image_size: an image of {image.shape[-2]}x{image.shape[-1]} pixels is not a whole number of patches of "
            f"{patch_size}x{patch_size} (backbone.patch_size)"
        )
    return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, P * P * C] -> [B, C, H, W], N = rows * columns of ``grid``."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch_size, q=patch_size)


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes each patch to zero mean and unit variance over its values, in float32 or float64: (normalized, mean,
    std). The variance is unbiased, as in MAE's code."""
    patches = at_least_float32(patches)
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + eps).sqrt()
    return (patches - mean) / std, mean, std


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked patches of the whole batch.

    Args:
        prediction, target: [B, N, D].
        mask: [B, N], 1 where masked.
    """
    error = (at_least_float32(prediction) - at_least_float32(target)).pow(2).mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean absolute error over the masked pixels of the whole batch, and over channels.

    Args:
        prediction, target: [B, C, H, W].
        mask: [B, 1, H, W], 1 or True where masked.
        eps: added to the number of masked pixels, as in the code of SimMIM; without a masked pixel the loss is 0.
    """
    error = (at_least_float32(prediction) - at_least_float32(target)).abs().mean(dim=1, keepdim=True)
    return (error * mask).sum() / (mask.sum() + eps)

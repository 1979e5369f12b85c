"""A ViT of timm that reads videos: its patches are tubelets of space and time, and all of them attend to each other."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.errors import SettingError


class TubeletEmbed(nn.Module):
    """Embeds tubelets as tokens, in the place of timm's ``PatchEmbed``:
    ``timm.create_model(…, embed_layer=partial(TubeletEmbed, frames=16), class_token=False)``.

    Args:
        frames: number of frames in a clip.
        tubelet_frames: number of frames in a tubelet.
        img_size, patch_size, in_chans, embed_dim, bias: as timm gives them.

    Raises:
        SettingError: the clip is no whole number of tubelets.
    """

    def __init__(
        self,
        *,
        frames: int,
        tubelet_frames: int = 2,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self.frames, self.tubelet_frames = frames, tubelet_frames
        self.img_size = to_2tuple(img_size)
        self.patch_size = to_2tuple(patch_size)
        rows, columns = (side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True))
        whole = (frames, *self.img_size) == (frames // tubelet_frames * tubelet_frames, *self._covered(rows, columns))
        if not whole or 0 in (frames // tubelet_frames, rows, columns):
            raise SettingError(
                f"backbone: a clip of {frames} frames of {self.img_size[0]}x{self.img_size[1]} pixels is no whole "
                f"number of tubelets of {tubelet_frames} frames of {self.patch_size[0]}x{self.patch_size[1]}"
            )
        self.grid = (frames // tubelet_frames, rows, columns)
        self.grid_size = (rows, columns)
        self.num_patches = self.grid[0] * rows * columns
        size = (tubelet_frames, *self.patch_size)
        self.projection = nn.Conv3d(in_chans, embed_dim, kernel_size=size, stride=size, bias=bias)

    def _covered(self, rows: int, columns: int) -> tuple[int, int]:
        return rows * self.patch_size[0], columns * self.patch_size[1]

    def forward(self, video: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, N, D]; frame by frame, each in raster order.

        Raises:
            SettingError: clips of another length or size.
        """
        if (video.shape[1], *video.shape[-2:]) != (self.frames, *self.img_size):
            raise SettingError(
                f"data.train_view.clip.frames, image_size: clips of {video.shape[1]} frames of "
                f"{video.shape[-2]}x{video.shape[-1]} pixels, where the backbone reads {self.frames} of "
                f"{self.img_size[0]}x{self.img_size[1]}"
            )
        return self.projection(video.transpose(1, 2)).flatten(2).transpose(1, 2)


def video_vit(model_name: str, **options: Any) -> VisionTransformer:
    """A ViT of timm that reads clips, with the fixed positions of VideoMAE.

    Args:
        model_name, options: as of ``timm.create_model``, among them ``embed_layer=partial(TubeletEmbed, frames=…)`` and
            ``class_token=False``.
    """
    vit: VisionTransformer = timm.create_model(model_name, **options)  # type: ignore[assignment]
    vit.pos_embed = sinusoids(vit.embed_dim, vit.patch_embed.num_patches)
    return vit


def sinusoids(dim: int, count: int) -> nn.Parameter:
    """The table of Vaswani et al. (2017), sines and cosines in turn, without gradient: [1, count, dim]."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    angle = position * 10_000.0 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos()).float()
    return nn.Parameter(table.unsqueeze(0), requires_grad=False)

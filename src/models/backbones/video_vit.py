"""A ViT of timm that reads videos: its patches are tubelets of space and time, and all of them attend to each other."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.image_encoder import Features, ImageEncoder, Pool, mean_patch


class TubeletEmbed(nn.Module):
    """Cubes to tokens, in the place of timm's ``PatchEmbed``:
    ``timm.create_model(…, embed_layer=partial(TubeletEmbed, frames=16), class_token=False)``.

    Args:
        frames: of a clip.
        cube_frames: of a tubelet.
        img_size, patch_size, in_chans, embed_dim, bias: as timm gives them.

    Raises:
        SettingError: the clip is no whole number of tubelets.
    """

    def __init__(
        self,
        *,
        frames: int,
        cube_frames: int = 2,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self.frames, self.cube_frames = frames, cube_frames
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        rows, columns = (side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True))
        whole = (frames, *self.img_size) == (frames // cube_frames * cube_frames, *self._covered(rows, columns))
        if not whole or 0 in (frames // cube_frames, rows, columns):
            raise SettingError(
                f"backbone: a clip of {frames} frames of {self.img_size[0]}x{self.img_size[1]} pixels is no whole "
                f"number of cubes of {cube_frames} frames of {self.patch_size[0]}x{self.patch_size[1]}"
            )
        self.grid = (frames // cube_frames, rows, columns)
        self.grid_size = (rows, columns)
        self.num_patches = self.grid[0] * rows * columns
        size = (cube_frames, *self.patch_size)
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


class VideoEncoder(ImageEncoder):
    """An `ImageEncoder` of clips, its embedding the mean of all positions.

    Args:
        backbone: a ViT with a `TubeletEmbed`, or a ConvNet whose map is [B, D, T, H, W].
        pool: see `ImageEncoder`.
    """

    def __init__(self, backbone: nn.Module, pool: Pool = mean_patch) -> None:
        super().__init__(backbone, pool=pool)

    def forward(self, image: Tensor) -> Features:
        """image: clips [B, T, 3, H, W], normalized."""
        output = self.backbone.forward_features(image)  # type: ignore[operator]
        if output.ndim == 5:
            patches, grid = output.flatten(2).transpose(1, 2), tuple(output.shape[2:])
        else:
            patches, grid = output, tuple(self.backbone.patch_embed.grid)  # type: ignore[union-attr,arg-type]
        return Features(embedding=self.pool(patches[:, :0], patches), patches=patches, grid=grid)


class FrameEncoder(ImageEncoder):
    """A backbone of images that reads the frames of a clip one by one; their embeddings are averaged."""

    def forward(self, image: Tensor) -> Features:
        """image: clips [B, T, 3, H, W], normalized."""
        batch, frames = image.shape[:2]
        each = super().forward(image.flatten(0, 1))
        return Features(
            embedding=each.embedding.unflatten(0, (batch, frames)).mean(dim=1),
            patches=each.patches.reshape(batch, -1, each.patches.shape[-1]),
            grid=(frames, *each.grid),
        )


def reads_clips(backbone: nn.Module) -> bool:
    """Whether a backbone takes [B, T, 3, H, W], not images."""
    return bool(getattr(backbone, "reads_clips", False)) or isinstance(
        getattr(backbone, "patch_embed", None), TubeletEmbed
    )


def clip_encoder(backbone: nn.Module, pool: Pool = mean_patch) -> ImageEncoder:
    """The encoder of clips that a backbone makes, of clips or of images."""
    return VideoEncoder(backbone, pool) if reads_clips(backbone) else FrameEncoder(backbone, pool)


def sinusoids(dim: int, count: int) -> nn.Parameter:
    """The table of Vaswani et al. (2017), sines and cosines in turn, without gradient: [1, count, dim]."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    angle = position * 10_000.0 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos()).float()
    return nn.Parameter(table.unsqueeze(0), requires_grad=False)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])

"""Converts decoded images and videos to the number of channels that an encoder reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.datamodules.video_reader import VideoReader
from src.errors import SettingError

_LUMA = (19595, 38470, 7471)  # of 65,536: ITU-R 601, as Pillow rounds it


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Converts decoded images to ``channels``, as `EncodedImage` does files: RGB to grayscale, grayscale to RGB, either
    to RGBA with a fourth channel of 255.

    Args:
        images: uint8 [..., C, H, W].
        channels: of the result.

    Returns:
        uint8 [..., channels, H, W].

    Raises:
        SettingError: there is no such conversion, because the meaning of the channels is unknown.
    """
    own = images.shape[-3]
    if own == channels:
        return images
    if (own, channels) == (3, 1):
        red, green, blue = (images.select(-3, color).to(torch.int32) * weight for color, weight in enumerate(_LUMA))
        return ((red + green + blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)
    if own in (1, 3) and channels in (3, 4):
        colors = images.expand(*images.shape[:-3], 3, *images.shape[-2:])
        opaque = torch.full_like(images[..., :1, :, :], 255)
        return colors if channels == 3 else torch.cat([colors, opaque], dim=-3)
    raise SettingError(
        f"data.channels={channels}: the images of data.source have {own} channels, which cannot be converted: "
        f"set data.channels={own}, with as many numbers in data.mean and data.std"
    )


class VideoInChannels(VideoReader):
    """A video whose frames have another number of channels.

    Args:
        video: the video; its optical flow, if it knows it, stays the same.
        channels: see `to_channels`.
    """

    def __init__(self, video: VideoReader, channels: int) -> None:
        self.video = video
        self.channels = channels

    @property
    def duration(self) -> float:
        return self.video.duration

    @property
    def rate(self) -> float:
        return self.video.rate

    def frames_at(self, times: Sequence[float]) -> Tensor:
        return to_channels(self.video.frames_at(times), self.channels)

    def flow(self, times: Sequence[float]) -> Tensor:
        """See `FlowFilmReader`."""
        return self.video.flow(times)  # type: ignore[attr-defined]  # asked only of videos that have it

"""Statistics of motion and appearance, the pretext labels of Wang et al. (2021)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from scipy.ndimage import convolve
from torch import Tensor
from torch.nn import functional as F

from src.datamodules.batches.video import StatisticsBatch
from src.datamodules.video_reader import FlowFilmReader, VideoReader
from src.datamodules.views.resample import resample_box, whole_pixels
from src.datamodules.views.video import Clip, FrameCrop, VideoView
from src.errors import SettingError
from src.image_size import Size, height_and_width

_ACROSS = np.array([[[-1, 0, 1]] * 3])  # [1, 3, 3]: each frame is filtered alone
_DOWN = _ACROSS.transpose(0, 2, 1)
_DIRECTIONS = 8
_STILL = 1e-4  # pixels: interpolation error of a constant flow


@dataclass(frozen=True)
class StatisticsCrop(VideoView):
    """A random clip in a random box, with 27 statistics of its flow and its pixels after crop and mirror; see
    `motion_statistics` and `appearance_statistics`.

    Args:
        clip: selects the frames.
        crop: selects the region of the frames, and the size it is resized to, whose sides are multiples of 8.

    Raises:
        SettingError: a side is no multiple of 8.
    """

    clip: Clip
    crop: FrameCrop

    batch_type: ClassVar[type] = StatisticsBatch
    needs_flow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if any(side % 8 for side in height_and_width(self.crop.size)):
            raise SettingError(
                f"image_size={self.crop.size}: four rings and sixteen blocks of a frame need a multiple of 8"
            )

    @property
    def num_uniforms(self) -> int:
        return self.clip.num_uniforms + self.crop.num_uniforms

    def from_video(self, video: VideoReader, uniform: np.ndarray) -> dict[str, Tensor]:
        with_flow: FlowFilmReader = video  # type: ignore[assignment]  # the DataModule refuses videos without flow
        times = self.clip.times(video.duration, video.rate, uniform).tolist()
        after = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1 / video.rate)
        # as in the authors' code, each frame has a flow field, the last one to the frame after the clip
        frames, flow = with_flow.frames_at(times), with_flow.flow([*times, after])
        of_crop = uniform[self.clip.num_uniforms :]
        (box,) = self.crop.boxes(frames.shape[-2], frames.shape[-1], of_crop[None])
        flip = bool(of_crop[-1] < self.crop.flip)
        cropped = resample_box(frames, box, self.crop.size, flip, self.crop.interpolation)
        flow = crop_flow(flow, box, self.crop.size, flip)
        return {
            "video": cropped,
            "motion": motion_statistics(flow.numpy(), frames=max(1, len(times) - 1)),
            "appearance": appearance_statistics(cropped.numpy()),
        }


def crop_flow(flow: Tensor, box: np.ndarray, size: Size, flip: bool) -> Tensor:
    """Crops a flow as `resample_box` crops its frames, and converts it to pixels of the resized crop.

    Args:
        flow: float32 [N, 2, H, W], pixels to the right and down.
        box: top, left, height, width.
        size: side of the result, or its height and width (h, w).
        flip: mirrors left to right, which also negates the horizontal flow.

    Returns:
        float32 [N, 2, h, w].
    """
    height, width = flow.shape[-2:]
    out_height, out_width = height_and_width(size)
    top, left, rows, columns = whole_pixels(box)
    sign = -1.0 if flip else 1.0
    # the box in coordinates from -1 to 1
    theta = torch.tensor(
        [
            [sign * columns / width, 0.0, (2 * left + columns) / width - 1],
            [0.0, rows / height, (2 * top + rows) / height - 1],
        ]
    )
    grid = F.affine_grid(theta[None], [1, 2, out_height, out_width], align_corners=False)
    cropped = F.grid_sample(flow, grid.expand(len(flow), -1, -1, -1), padding_mode="border", align_corners=False)
    return cropped * torch.tensor([sign * out_width / columns, out_height / rows]).view(2, 1, 1)


def motion_statistics(flow: np.ndarray, frames: int | None = None) -> Tensor:
    """Returns the place, direction and time of the strongest motion boundaries: 14 numbers.

    Motion boundaries are derivatives of the flow's horizontal part u and vertical part v; the camera's motion, the same
    everywhere, has none. Each of the `partitions` gives four numbers: the region with the strongest boundaries of u,
    summed over time, and their direction, then the same of v. The last two are the frame with the strongest boundaries
    of u, and of v. Numbers start at 1; 0 stands for no boundary.

    Args:
        flow: float [N, 2, H, W], H and W multiples of 8.
        frames: the strongest frame is one of the first ``frames``, N - 1 in the authors' code; None for all.

    Returns:
        float32 [14].
    """
    boundaries = [_boundaries(flow[:, part], frames) for part in range(2)]
    numbers: list[int] = []
    for regions in partitions(flow.shape[-2], flow.shape[-1]):
        for boundary in boundaries:
            numbers += _strongest(boundary, regions)
    numbers += [boundary.frame for boundary in boundaries]
    return torch.tensor(numbers, dtype=torch.float32)


class _Boundaries(NamedTuple):
    """Motion boundaries of one part of the flow."""

    strength: np.ndarray  # [H, W], magnitude of the derivatives' sum over time
    angle: np.ndarray  # [H, W], in eighths of a turn, [0, 8)
    frame: int  # with the strongest boundaries, from 1; 0 for none


def _boundaries(part: np.ndarray, frames: int | None) -> _Boundaries:
    across, down = (convolve(part.astype(np.float64), kernel) for kernel in (_ACROSS, _DOWN))
    of_frame = np.hypot(across, down)
    of_frame[of_frame < _STILL] = 0.0
    totals = of_frame[:frames].sum(axis=(1, 2))
    x, y = across.sum(axis=0), down.sum(axis=0)
    strength = np.hypot(x, y)
    strength[strength < _STILL] = 0.0
    angle = np.arctan2(y, x) * (_DIRECTIONS / (2 * np.pi)) % _DIRECTIONS
    return _Boundaries(strength, angle, int(totals.argmax()) + 1 if totals.any() else 0)


def _strongest(boundary: _Boundaries, regions: Regions) -> tuple[int, int]:
    """Returns the region with the strongest boundaries, and their direction there; both from 1, 0 for none."""
    if not boundary.strength.any():
        return 0, 0
    strength = regions.masks.reshape(len(regions.masks), -1) @ boundary.strength.ravel()
    if regions.unequal:
        strength = strength / regions.masks.sum(axis=(1, 2))
    place = int(strength.argmax())
    amount, angle = boundary.strength[regions.masks[place]], boundary.angle[regions.masks[place]]
    low = np.floor(angle)
    bins = low.astype(int) % _DIRECTIONS
    # each pixel's strength goes to the two directions it lies between
    histogram = np.bincount(bins, amount * (1 - (angle - low)), _DIRECTIONS)
    histogram += np.bincount((bins + 1) % _DIRECTIONS, amount * (angle - low), _DIRECTIONS)
    return place + 1, int(histogram.argmax()) + 1


def appearance_statistics(video: np.ndarray) -> Tensor:
    """Returns the places where colors change most and least over time, and these colors: 13 numbers.

    Each of the `partitions` gives four numbers: the region whose color histograms overlap least between frames and its
    most frequent color, then the same of the region whose histograms overlap most. The last number is the most frequent
    color of the whole clip. Colors are the eight octants of the RGB cube. Numbers start at 1.

    Args:
        video: uint8 [T, 3, H, W], H and W multiples of 8.

    Returns:
        float32 [13].
    """
    numbers: list[int] = []
    for regions in partitions(video.shape[-2], video.shape[-1]):
        overlap = [_overlap(video[:, :, mask]) for mask in regions.masks]
        for place in (int(np.argmin(overlap)), int(np.argmax(overlap))):
            numbers += [place + 1, _dominant(video[:, :, regions.masks[place]])]
    numbers.append(_dominant(video.reshape(*video.shape[:2], -1)))
    return torch.tensor(numbers, dtype=torch.float32)


def _overlap(pixels: np.ndarray) -> float:
    """Returns intersection over union of the frames' 256-bin histograms, averaged over channels: uint8 [T, 3, N]."""
    frames, channels, _ = pixels.shape
    row = 256 * np.arange(frames * channels).reshape(frames, channels, 1)
    counts = np.bincount((row + pixels).ravel(), minlength=256 * frames * channels).reshape(frames, channels, 256)
    return float((counts.min(axis=0).sum(axis=-1) / counts.max(axis=0).sum(axis=-1)).mean())


def _dominant(pixels: np.ndarray) -> int:
    """Returns the octant, from 1, of the most frequent color of uint8 [T, 3, N]. Ties go to the color with the least
    blue, then the least green."""
    red, green, blue = (pixels[:, channel].astype(np.int32) for channel in range(3))
    colors, counts = np.unique(blue << 16 | green << 8 | red, return_counts=True)
    color = int(colors[counts.argmax()])
    red_on, green_on, blue_on = color >> 7 & 1, color >> 15 & 1, color >> 23 & 1
    return (0 if blue_on else 4) + 2 * red_on + green_on + 1


class Regions(NamedTuple):
    """A partition of a frame."""

    masks: np.ndarray  # bool [R, H, W]
    unequal: bool  # True if the regions differ in size, and are compared by their means


@cache
def partitions(height: int, width: int) -> tuple[Regions, Regions, Regions]:
    """Returns three partitions: sixteen blocks, row by row; four rings, from the center; eight triangles, halves of the
    quarters along the diagonals through the center. A diagonal belongs to both of its triangles."""
    rows, columns = np.indices((height, width))
    blocks = rows // (height // 4) * 4 + columns // (width // 4)
    eighths = (np.minimum(at, side - 1 - at) // (side // 8) for at, side in ((rows, height), (columns, width)))
    rings = 3 - np.minimum(*eighths)
    half_height, half_width = height // 2, width // 2
    # twice the distances of the pixels' centers from the quarter's corner, in the other side's units
    down, across = (2 * rows + 1) * half_width, (2 * columns + 1) * half_height
    below, above = ((down >= across), (down <= across))
    below, above = below[:half_height, :half_width], above[:half_height, :half_width]
    # in the upper right and the lower left quarter the diagonal goes the other way
    halves = (
        (0, 0, (below, above)),
        (0, half_width, (above[:, ::-1], below[:, ::-1])),
        (half_height, 0, (above[:, ::-1], below[:, ::-1])),
        (half_height, half_width, (below, above)),
    )
    triangles = np.zeros((8, height, width), bool)
    for quarter, (top, left, pair) in enumerate(halves):
        for number, mask in enumerate(pair):
            triangles[2 * quarter + number, top : top + half_height, left : left + half_width] = mask
    return (
        Regions(blocks == np.arange(16)[:, None, None], unequal=False),
        Regions(rings == np.arange(4)[:, None, None], unequal=True),
        Regions(triangles, unequal=False),
    )

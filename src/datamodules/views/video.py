"""Views that make a `VideoBatch`: clips of a video, whose frames are all cropped alike."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from src.datamodules.batches.video import VideoBatch
from src.datamodules.sources.source import Sample
from src.datamodules.video_reader import VideoReader
from src.datamodules.views.augment import StrongFrames
from src.datamodules.views.color import Color
from src.datamodules.views.resample import Interpolation, resample_box
from src.datamodules.views.view import View
from src.errors import SettingError
from src.image_size import Size, fitted_box, height_and_width


class Clip(Protocol):
    """Selects frames of a video."""

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        ...

    @property
    def num_uniforms(self) -> int:
        """Random numbers needed for one clip."""
        ...

    def times(self, duration: float, rate: float, uniform: np.ndarray) -> np.ndarray:
        """Returns the times of the frames, seconds from the beginning in order: [T].

        Args:
            duration: of the video, seconds.
            rate: of the video, frames a second.
            uniform: [num_uniforms] in [0, 1]; 0.5 selects the middle of the video.
        """
        ...

    def even_positions(self, count: int) -> np.ndarray:
        """Returns the random number that selects each of ``count`` clips which cover a video evenly: [count]. It stands
        for all of a clip's random numbers."""
        ...


@dataclass(frozen=True)
class DenseClip:
    """Frames in even steps from a random start. If the clip is longer than the video, the last frame is repeated.

    Args:
        frames: of a clip.
        stride: step in frames of the video.
        rate: frames a second, whatever the video's own rate; None for the stride.
        spread: spreads the frames over the whole ``frames * stride`` frames of the video, from the first to the last
            one, so that some steps are ``stride`` and others ``stride + 1``: VideoMAE's clips for fine-tuning.

    Raises:
        SettingError: frames or stride are below 1, the rate is not above 0, or ``spread`` is set with a rate.
    """

    frames: int = 16
    stride: int = 4
    rate: float | None = None
    spread: bool = False

    num_uniforms: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or (self.rate is not None and self.rate <= 0):
            raise SettingError(
                f"a clip needs frames and stride of at least 1 and a rate above 0; got {self.frames}, {self.stride}, "
                f"{self.rate}"
            )
        if self.spread and self.rate is not None:
            raise SettingError(
                f"clip: spread=true counts frames of the video, which rate={self.rate} does not; drop one"
            )

    def times(self, duration: float, rate: float, uniform: np.ndarray) -> np.ndarray:
        if self.spread:
            return self._spread(round(duration * rate), float(uniform[0])) / rate
        step = self.stride / rate if self.rate is None else 1 / self.rate
        room = max(0.0, duration - 1 / rate - (self.frames - 1) * step)
        return room * float(uniform[0]) + step * np.arange(self.frames)

    def _spread(self, length: int, uniform: float) -> np.ndarray:
        """Returns the numbers of the frames in a video of ``length`` frames."""
        covered = self.frames * self.stride
        start = int(uniform * max(1, length - covered))
        steps = np.linspace(0, covered, self.frames).astype(np.int64)
        return start + np.minimum(steps, covered - 1)

    def even_positions(self, count: int) -> np.ndarray:
        """Returns positions from the first clip to the last one, the middle for one clip."""
        return np.linspace(0.0, 1.0, count) if count > 1 else np.array([0.5])


@dataclass(frozen=True)
class SegmentClip:
    """One frame at a random time in each of ``frames`` equal parts of the video, as in temporal segment networks (Wang
    et al., 2016).

    Args:
        frames: of a clip.

    Raises:
        SettingError: there are fewer than one.
    """

    frames: int = 8

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise SettingError(f"a clip needs at least one frame, got {self.frames}")

    @property
    def num_uniforms(self) -> int:
        return self.frames

    def times(self, duration: float, rate: float, uniform: np.ndarray) -> np.ndarray:
        return (np.arange(self.frames) + uniform[: self.frames]) * (duration / self.frames)

    def even_positions(self, count: int) -> np.ndarray:
        """Returns positions at which the frames of all clips together are in even steps; for one clip each part's
        middle."""
        return np.arange(count) / count if count > 1 else np.array([0.5])


class FrameCrop(Protocol):
    """Selects the region of all frames of a clip, such as `RandomResizedCrop` or `MultiScaleCrop`."""

    @property
    def size(self) -> Size:
        """Side of the result in pixels, or its height and width."""
        ...

    @property
    def flip(self) -> float:
        """Probability of a left-right mirror, decided by the last random number."""
        ...

    @property
    def interpolation(self) -> Interpolation:
        """Interpolation of the resize, antialiased."""
        ...

    @property
    def num_uniforms(self) -> int:
        """Random numbers needed for one box."""
        ...

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Returns boxes [B, 4] (top, left, height, width) for uniform [B, num_uniforms]."""
        ...


class VideoView(View):
    """A view of clips."""

    clip: Clip

    @abstractmethod
    def from_video(self, video: VideoReader, uniform: np.ndarray) -> dict[str, Tensor]:
        """Makes the clips of a video, ``video`` uint8 [T, C, h, w], or [rows, T, C, h, w] if there are several. Raises
        BadSample."""

    def from_sample(self, sample: Sample, uniform: np.ndarray) -> dict[str, Tensor]:
        return self.from_video(sample["image"], uniform)  # type: ignore[arg-type]  # the DataModule refuses images


@dataclass(frozen=True)
class MultiScaleCrop:
    """A box whose sides are the frame's shorter side times two neighboring ``scales``, at one of 5 or 13 places, as in
    temporal segment networks (Wang et al., 2016). A side within two pixels of ``size`` becomes ``size``, which saves
    the resize. For a size that is no square the scales are those of the largest box of its proportions.

    Args:
        size: side of the result in pixels, or its height and width.
        scales: in descending order.
        places: 5 for the corners and the center, 13 also for the centers of the sides and the points between.
        flip: probability of a left-right mirror; 0 if labels distinguish left and right.
        interpolation: "bilinear" or "bicubic".

    Raises:
        SettingError: the size is none, a scale is not in (0, 1], or another number of places.
    """

    size: Size
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    places: int = 13
    flip: float = 0.5
    interpolation: Interpolation = "bilinear"

    num_uniforms: ClassVar[int] = 3

    def __post_init__(self) -> None:
        height_and_width(self.size)
        if not self.scales or not 0 < min(self.scales) <= max(self.scales) <= 1:
            raise SettingError(f"MultiScaleCrop: scales must lie in (0, 1], got {tuple(self.scales)}")
        if self.places not in (5, len(_PLACES)):
            raise SettingError(f"MultiScaleCrop: places must be 5 or {len(_PLACES)}, got {self.places}")

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        of_rows, of_columns = (
            self._sides(longest, out)
            for longest, out in zip(fitted_box(height, width, self.size), height_and_width(self.size), strict=True)
        )
        pairs = np.array([(a, b) for i, a in enumerate(of_rows) for j, b in enumerate(of_columns) if abs(i - j) <= 1])
        rows, columns = pairs[(uniform[:, 0] * len(pairs)).astype(int)].T
        # in quarters of the free space: corners, centers of sides, the center, and points between them
        top, left = _PLACES[(uniform[:, 1] * self.places).astype(int)].T
        return np.stack([(height - rows) // 4 * top, (width - columns) // 4 * left, rows, columns], axis=1).astype(
            float
        )

    def _sides(self, longest: float, out: int) -> list[int]:
        sides = (int(longest * scale) for scale in self.scales)
        return [out if abs(side - out) < 3 and out <= longest else side for side in sides]


# the corners and the center come first
_PLACES = np.array(
    [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
)


@dataclass(frozen=True)
class RandomSquare:
    """A square at a random place of the frame, or a box of the proportions of ``size``.

    Args:
        size: side of the result in pixels, or its height and width.
        share: side of the square over the frame's shorter side.
        flip: probability of a left-right mirror; 0 if labels distinguish left and right.
        interpolation: "bilinear" or "bicubic".

    Raises:
        SettingError: the size is none, or the share is not in (0, 1].
    """

    size: Size
    share: float = 0.875
    flip: float = 0.5
    interpolation: Interpolation = "bilinear"

    num_uniforms: ClassVar[int] = 3

    def __post_init__(self) -> None:
        height_and_width(self.size)
        if not 0 < self.share <= 1:
            raise SettingError(f"RandomSquare: share must lie in (0, 1], got {self.share}")

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        rows, columns = (np.full(len(uniform), side * self.share) for side in fitted_box(height, width, self.size))
        return np.stack([(height - rows) * uniform[:, 0], (width - columns) * uniform[:, 1], rows, columns], axis=1)


@dataclass(frozen=True)
class RandomVideoCrop(VideoView):
    """A random clip, cropped to the same random box in all of its frames.

    Args:
        clip: selects the frames.
        crop: selects the region of the frames, the size it is resized to, and how.
        repeats: number of augmentations of the same frames, each with a box and changes of its own: repeated
            augmentation (Hoffer et al., 2020), which decodes a video once for several rows of a batch.
        strong: RandAugment and random erasing of the frames; None for neither.
        color: color augmentation, the same for all frames; None for none.

    Raises:
        SettingError: ``repeats`` is below 1.
    """

    clip: Clip
    crop: FrameCrop
    repeats: int = 1
    strong: StrongFrames | None = None
    color: Color | None = None

    batch_type: ClassVar[type] = VideoBatch

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise SettingError(f"data.train_view.repeats must be at least 1, got {self.repeats}")

    def check_channels(self, channels: int) -> None:
        for change in (self.strong, self.color):
            if change is not None:
                change.check_channels(channels)

    @property
    def num_uniforms(self) -> int:
        return self.clip.num_uniforms + self.repeats * self._uniforms_of_one

    @property
    def rows(self) -> int:
        return self.repeats

    def from_video(self, video: VideoReader, uniform: np.ndarray) -> dict[str, Tensor]:
        frames = video.frames_at(self.clip.times(video.duration, video.rate, uniform).tolist())
        repeats = uniform[self.clip.num_uniforms :].reshape(self.repeats, self._uniforms_of_one)
        clips = [self._cropped(frames, numbers) for numbers in repeats]
        return {"video": clips[0] if self.repeats == 1 else torch.stack(clips)}

    @property
    def _uniforms_of_one(self) -> int:
        changes = (change for change in (self.strong, self.color) if change is not None)
        return self.crop.num_uniforms + sum(change.num_uniforms for change in changes)

    def _cropped(self, frames: Tensor, uniform: np.ndarray) -> Tensor:
        of_crop, of_changes = uniform[: self.crop.num_uniforms], uniform[self.crop.num_uniforms :]
        if self.strong is not None:
            frames = self.strong.augment(frames, of_changes)
        (box,) = self.crop.boxes(frames.shape[-2], frames.shape[-1], of_crop[None])
        flip = bool(of_crop[-1] < self.crop.flip)
        cropped = resample_box(frames, box, self.crop.size, flip=flip, interpolation=self.crop.interpolation)
        if self.color is not None:
            cropped = self.color(cropped, np.tile(of_changes[-Color.num_uniforms :], (len(frames), 1)))
        return cropped if self.strong is None else self.strong.erase_rectangle(cropped, of_changes)


@dataclass(frozen=True)
class CenterVideoCrop(VideoView):
    """Clips at even times of the video, and squares at even places along the frames' longer side; a single one is in
    the middle. Takes no random numbers, and decodes no frame twice. For a size that is no square, boxes of its
    proportions lie along the side that leaves them more room.

    The rows are ordered by clip, then by square.

    Args:
        clip: selects the frames.
        size: side of the result in pixels, or its height and width.
        share: side of the square over the frame's shorter side.
        segments: clips of a video.
        crops: squares of each clip.
        interpolation: "bilinear" or "bicubic".

    Raises:
        SettingError: the size is none, or segments or crops are below 1.
    """

    clip: Clip
    size: Size
    share: float = 0.875
    segments: int = 1
    crops: int = 1
    interpolation: Interpolation = "bilinear"

    batch_type: ClassVar[type] = VideoBatch
    num_uniforms: ClassVar[int] = 0

    def __post_init__(self) -> None:
        height_and_width(self.size)
        if self.segments < 1 or self.crops < 1:
            raise SettingError(
                f"data.eval_view: segments and crops must be at least 1, got {self.segments} and {self.crops}"
            )

    @property
    def rows(self) -> int:
        return self.segments * self.crops

    def from_video(self, video: VideoReader, uniform: np.ndarray) -> dict[str, Tensor]:
        positions = self.clip.even_positions(self.segments)
        times = [
            self.clip.times(video.duration, video.rate, np.full(self.clip.num_uniforms, position))
            for position in positions
        ]
        frames = video.frames_at(np.concatenate(times).tolist())
        crops = torch.stack([self._box(frames, place) for place in _even_places(self.crops)], dim=1)
        clips = crops.unflatten(0, (self.segments, -1)).transpose(1, 2).flatten(0, 1)
        return {"video": clips[0] if self.rows == 1 else clips}

    def _box(self, frames: Tensor, place: float) -> Tensor:
        """Crops a box at ``place`` in [0, 1] along the side with more room, in the middle of the other one."""
        height, width = frames.shape[-2:]
        out_height, out_width = height_and_width(self.size)
        rows, columns = (side * self.share for side in fitted_box(height, width, self.size))
        down, right = (place, 0.5) if height * out_width > width * out_height else (0.5, place)
        box = np.array([(height - rows) * down, (width - columns) * right, rows, columns])
        return resample_box(frames, box, self.size, interpolation=self.interpolation)


def _even_places(count: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, count) if count > 1 else np.array([0.5])

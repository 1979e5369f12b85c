"""Views that make a `VideoBatch`: some of a video's frames, all cropped alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from src.datamodules.batches.video import VideoBatch
from src.datamodules.video_reader import VideoReader
from src.datamodules.views.augment import StrongFrames
from src.datamodules.views.color import Color
from src.datamodules.views.resample import resample_box
from src.errors import SettingError


class Clip(Protocol):
    """Which frames of a video are taken."""

    @property
    def draws(self) -> int:
        """Random numbers needed for one clip."""
        ...

    def times(self, duration: float, rate: float, uniform: np.ndarray) -> np.ndarray:
        """Seconds from the beginning, in order: [T].

        Args:
            duration: of the video, seconds.
            rate: its frames a second.
            uniform: [draws] in [0, 1]; the middle of a video at 0.5.
        """
        ...

    def places(self, count: int) -> np.ndarray:
        """``count`` clips that cover a video evenly: what all of a clip's draws are for each, [count]."""
        ...


@dataclass(frozen=True)
class DenseClip:
    """Frames in even steps from a random beginning. A clip that is longer than its video ends with the last frame held.

    Args:
        frames: of a clip.
        stride: frames of the video from one to the next.
        rate: instead of the stride, frames a second, whatever the video's own rate.
    """

    frames: int = 16
    stride: int = 4
    rate: float | None = None

    draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or (self.rate is not None and self.rate <= 0):
            raise SettingError(
                f"a clip needs frames and stride of at least 1 and a rate above 0; got {self.frames}, {self.stride}, "
                f"{self.rate}"
            )

    def times(self, duration: float, rate: float, uniform: np.ndarray) -> np.ndarray:
        step = self.stride / rate if self.rate is None else 1 / self.rate
        room = max(0.0, duration - 1 / rate - (self.frames - 1) * step)
        return room * float(uniform[0]) + step * np.arange(self.frames)

    def places(self, count: int) -> np.ndarray:
        """From the first clip there is to the last one; of one clip the middle."""
        return np.linspace(0.0, 1.0, count) if count > 1 else np.array([0.5])


@dataclass(frozen=True)
class SegmentClip:
    """One random time in each of ``frames`` equal parts of the video: the sampling of temporal segment networks (Wang
    et al., 2016)."""

    frames: int = 8

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise SettingError(f"a clip needs at least one frame, got {self.frames}")

    @property
    def draws(self) -> int:
        return self.frames

    def times(self, duration: float, rate: float, uniform: np.ndarray) -> np.ndarray:
        return (np.arange(self.frames) + uniform[: self.frames]) * (duration / self.frames)

    def places(self, count: int) -> np.ndarray:
        """So that the frames of all clips together are even steps; of one clip each part's middle."""
        return np.arange(count) / count if count > 1 else np.array([0.5])


class Boxes(Protocol):
    """Which part of a frame is taken, such as `RandomResizedCrop` or `MultiScaleCrop`."""

    @property
    def size(self) -> int:
        """Side of the result in pixels."""
        ...

    @property
    def flip(self) -> float:
        """Probability of a left-right mirror, which the last number decides."""
        ...

    @property
    def draws(self) -> int:
        """Random numbers needed for one box."""
        ...

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Boxes [B, 4] (top, left, height, width) for uniform [B, draws]."""
        ...


@dataclass(frozen=True)
class MultiScaleCrop:
    """A box whose sides are the frame's shorter side times two neighbors of ``scales``, at one of 13 places: the
    augmentation of temporal segment networks (Wang et al., 2016).

    Args:
        size: side of the result in pixels.
        scales: in falling order.
        flip: probability of a left-right mirror; 0 where left and right are a part of the label.
    """

    size: int
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: float = 0.5

    draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not self.scales or not 0 < min(self.scales) <= max(self.scales) <= 1:
            raise SettingError(f"MultiScaleCrop: scales must lie in (0, 1], got {tuple(self.scales)}")

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        sides = [int(min(height, width) * scale) for scale in self.scales]
        pairs = np.array([(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1])
        rows, columns = pairs[(uniform[:, 0] * len(pairs)).astype(int)].T
        # quarters of the room above and to the left: corners, middles of sides, the middle, and between them
        top, left = _PLACES[(uniform[:, 1] * len(_PLACES)).astype(int)].T
        return np.stack([(height - rows) // 4 * top, (width - columns) // 4 * left, rows, columns], axis=1).astype(
            float
        )


_PLACES = np.array(
    [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
)


@dataclass(frozen=True)
class RandomSquare:
    """A square anywhere in the frame.

    Args:
        size: side of the result in pixels.
        share: side of the square over the frame's shorter side.
        flip: probability of a left-right mirror; 0 where left and right are a part of the label.
    """

    size: int
    share: float = 0.875
    flip: float = 0.5

    draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SettingError(f"RandomSquare: share must lie in (0, 1], got {self.share}")

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        side = np.full(len(uniform), min(height, width) * self.share)
        return np.stack([(height - side) * uniform[:, 0], (width - side) * uniform[:, 1], side, side], axis=1)


@dataclass(frozen=True)
class RandomVideoCrop:
    """A random clip in a random box, the same for all of its frames.

    Args:
        clip: which frames.
        crop: which part of them, and what becomes of it.
        repeats: how often the same frames are seen, each time in a box and with changes of their own: repeated
            augmentation (Hoffer et al., 2020), which decodes a video once for several rows of a batch.
        strong: what else happens to the frames; None for nothing.
        color: what happens to their colors, in all of them alike; None for nothing.
    """

    clip: Clip
    crop: Boxes
    repeats: int = 1
    strong: StrongFrames | None = None
    color: Color | None = None

    batch_type: ClassVar[type] = VideoBatch

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise SettingError(f"data.train_view.repeats must be at least 1, got {self.repeats}")

    @property
    def draws(self) -> int:
        return self.clip.draws + self.repeats * self._draws_of_one

    @property
    def rows(self) -> int:
        """How many clips a video becomes."""
        return self.repeats

    def encoded(self, image: VideoReader, uniform: np.ndarray) -> dict[str, Tensor]:
        """``video`` [T, 3, size, size], or [rows, T, 3, size, size] of more than one row."""
        frames = image.at(self.clip.times(image.duration, image.rate, uniform).tolist())
        each = uniform[self.clip.draws :].reshape(self.repeats, self._draws_of_one)
        clips = [self._cropped(frames, numbers) for numbers in each]
        return {"video": clips[0] if self.repeats == 1 else torch.stack(clips)}

    @property
    def _draws_of_one(self) -> int:
        return self.crop.draws + sum(each.draws for each in (self.strong, self.color) if each is not None)

    def _cropped(self, frames: Tensor, uniform: np.ndarray) -> Tensor:
        own, further = uniform[: self.crop.draws], uniform[self.crop.draws :]
        if self.strong is not None:
            frames = self.strong.augmented(frames, further)
        (box,) = self.crop.boxes(frames.shape[-2], frames.shape[-1], own[None])
        cropped = resample_box(frames, box, self.crop.size, flip=bool(own[-1] < self.crop.flip))
        if self.color is not None:
            cropped = self.color(cropped, np.tile(further[-Color.draws :], (len(frames), 1)))
        return cropped if self.strong is None else self.strong.erased(cropped, further)


@dataclass(frozen=True)
class CenterVideoCrop:
    """Clips at even places of the video, and squares at even places along the frames' longer side: of one the middle.
    No randomness, and no frame is decoded twice.

    Args:
        clip: which frames.
        size: side of the result in pixels.
        share: side of the square over the frame's shorter side.
        segments: clips of a video.
        crops: squares of each clip.
    """

    clip: Clip
    size: int
    share: float = 0.875
    segments: int = 1
    crops: int = 1

    batch_type: ClassVar[type] = VideoBatch
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.segments < 1 or self.crops < 1:
            raise SettingError(
                f"data.eval_view: segments and crops must be at least 1, got {self.segments} and {self.crops}"
            )

    @property
    def rows(self) -> int:
        """How many clips a video becomes."""
        return self.segments * self.crops

    def encoded(self, image: VideoReader, uniform: np.ndarray) -> dict[str, Tensor]:
        """``video`` [T, 3, size, size], or [rows, T, 3, size, size] of more than one row: clip by clip, each with its
        squares."""
        places = self.clip.places(self.segments)
        times = [self.clip.times(image.duration, image.rate, np.full(self.clip.draws, place)) for place in places]
        frames = image.at(np.concatenate(times).tolist())
        crops = torch.stack([self._square(frames, place) for place in _along(self.crops)], dim=1)
        clips = crops.unflatten(0, (self.segments, -1)).transpose(1, 2).flatten(0, 1)
        return {"video": clips[0] if self.rows == 1 else clips}

    def _square(self, frames: Tensor, place: float) -> Tensor:
        """``place`` in [0, 1] along the longer side, in the middle of the shorter one."""
        height, width = frames.shape[-2:]
        side = min(height, width) * self.share
        down, right = (place, 0.5) if height > width else (0.5, place)
        return resample_box(frames, np.array([(height - side) * down, (width - side) * right, side, side]), self.size)


def _along(count: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, count) if count > 1 else np.array([0.5])

"""Views that make a `VideoBatch`: some of a video's frames, all cropped alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from src.datamodules.batch import VideoBatch
from src.datamodules.footage import Footage
from src.datamodules.views.image import CentreCrop
from src.datamodules.views.resample import resample_boxes
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
            uniform: [draws] in [0, 1); the middle of a video at 0.5.
        """
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


class Boxes(Protocol):
    """Which part of a frame is taken, such as `RandomResizedCrop` or `MultiScaleCrop`."""

    size: int  # side of the result in pixels
    flip: float  # probability of a left-right mirror, the last number's part

    @property
    def draws(self) -> int:
        """Random numbers needed for one box."""
        ...

    def boxes(self, height: int, width: int, uniform: np.ndarray) -> np.ndarray:
        """Boxes [B, 4] (top, left, height, width) for uniform [B, draws]."""
        ...


@dataclass(frozen=True)
class MultiScaleCrop:
    """A box whose sides are the frame's shorter side times two neighbours of ``scales``, at one of 13 places: the
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
class RandomVideoCrop:
    """A random clip in a random box, the same for all of its frames.

    Args:
        clip: which frames.
        crop: which part of them, and what becomes of it.
    """

    clip: Clip
    crop: Boxes

    batch_type: ClassVar[type] = VideoBatch

    @property
    def draws(self) -> int:
        return self.clip.draws + self.crop.draws

    def encoded(self, image: Footage, uniform: np.ndarray) -> dict[str, Tensor]:
        frames = image.at(self.clip.times(image.duration, image.rate, uniform).tolist())
        own = uniform[self.clip.draws :]
        box = self.crop.boxes(frames.shape[-2], frames.shape[-1], own[None])
        mirrored = np.full(len(frames), own[-1] < self.crop.flip)
        return {"video": resample_boxes(frames, np.repeat(box, len(frames), axis=0), self.crop.size, flip=mirrored)}


@dataclass(frozen=True)
class CentreVideoCrop:
    """The middle of the video and of its frames, see `CentreCrop`. No randomness.

    Args:
        clip: which frames.
        size: side of the result in pixels.
        share: side of the square over the frame's shorter side.
    """

    clip: Clip
    size: int
    share: float = 0.875

    batch_type: ClassVar[type] = VideoBatch
    draws: ClassVar[int] = 0

    def encoded(self, image: Footage, uniform: np.ndarray) -> dict[str, Tensor]:
        times = self.clip.times(image.duration, image.rate, np.full(self.clip.draws, 0.5))
        crop = CentreCrop(self.size, self.share)
        return {"video": crop.decoded(image.at(times.tolist()), np.zeros((len(times), 0), np.float32))["image"]}

"""Encoded videos: frames are read by time rather than number, and broken videos are refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from src.datamodules.decoding import BadSample, DataError

try:
    import av
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None

_SEEK = 2.0  # seconds: farther frames are sought, nearer ones are reached by decoding
_SAME_TIME = 1e-4  # seconds: tolerance for equal times


class VideoReader(Protocol):
    """A video whose frames are read by time."""

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last one. Raises BadSample."""
        ...

    @property
    def rate(self) -> float:
        """Mean number of frames a second. Raises BadSample."""
        ...

    def frames_at(self, times: Sequence[float]) -> Tensor:
        """Returns the frames at ``times``, seconds from the start in any order: uint8 [T, 3, H, W], upright RGB. Times
        before the start give the first frame, times after the end the last one. Raises BadSample."""
        ...


class FlowFilmReader(VideoReader, Protocol):
    """A video that knows its optical flow."""

    def flow(self, times: Sequence[float]) -> Tensor:
        """Returns the optical flow from each of ``times`` to the next, in pixels to the right and down: float32
        [T - 1, 2, H, W]. Raises BadSample."""
        ...


class _Header(NamedTuple):
    duration: float
    rate: float


class EncodedVideo:
    """A video file, decoded by PyAV (FFmpeg). Frames of a variable rate are found by their presentation time.

    Args:
        path: of the file.

    Raises:
        DataError: PyAV is not installed (the extra ``video``).
    """

    def __init__(self, path: str | Path) -> None:
        if _missing is not None:
            raise DataError(f"videos need the extra 'video' (pip install -e '.[video]'): {_missing}")
        self.path = Path(path)
        self._header: _Header | None = None

    def __repr__(self) -> str:
        return f"EncodedVideo({self.path.name})"

    @property
    def duration(self) -> float:
        return self._read_header().duration

    @property
    def rate(self) -> float:
        return self._read_header().rate

    def frames_at(self, times: Sequence[float]) -> Tensor:
        order = np.argsort(times, kind="stable")
        frames: dict[int, Tensor] = {}
        with self._opened() as (container, stream):
            decoder = _ForwardDecoder(container, stream)
            frame, pixels = None, None
            for number in order:
                latest = decoder.frame_at(float(times[number]))
                if latest is not frame:  # a repeated frame is converted once
                    frame, pixels = latest, _upright(latest)
                assert pixels is not None
                frames[int(number)] = pixels
        return torch.stack([frames[number] for number in range(len(times))])

    def _read_header(self) -> _Header:
        if self._header is None:
            with self._opened() as (container, stream):
                rate = stream.average_rate or stream.guessed_rate
                length = None if stream.duration is None else float(stream.duration * stream.time_base)
                if length is None and container.duration is not None:
                    length = container.duration / av.time_base
                if not length or not rate:
                    raise BadSample("the video has no duration: it may have no frame")
                self._header = _Header(length, float(rate))
        return self._header

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise BadSample("the file has no video stream, only sound or text")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # loader processes use the cores
                yield container, stream
        except (av.error.FFmpegError, OSError) as error:
            raise BadSample(f"the video cannot be read: {error}") from error


class _ForwardDecoder:
    """Decodes frames in the order of their presentation, forward only, with seeks."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.begin = float((stream.start_time or 0) * stream.time_base)
        self.frames = container.decode(stream)
        self.current: Any = None
        self.next = next(self.frames, None)
        if self.next is None:
            raise BadSample("the video has no frame")

    def frame_at(self, time: float) -> Any:
        """Returns the last frame that starts at or before ``time``, which must not decrease between calls."""
        if self.next is not None and time - self._time(self.next) > _SEEK:
            self._seek(time)
        while self.next is not None and (self.current is None or self._time(self.next) <= time + _SAME_TIME):
            self.current, self.next = self.next, next(self.frames, None)
        return self.current

    def _seek(self, time: float) -> None:
        """Seeks to the last key frame before ``time``."""
        self.container.seek(round((time + self.begin) / self.stream.time_base), stream=self.stream)
        self.frames = self.container.decode(self.stream)
        key = next(self.frames, None)
        if key is not None:  # some files have no frame after the last key frame: the current one stays
            self.next = key

    def _time(self, frame: Any) -> float:
        return float(frame.time) - self.begin


def _upright(frame: Any) -> Tensor:
    """Converts a frame to upright uint8 [3, H, W]; phones store their orientation as a rotation of the frame."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

"""Videos as their files hold them: asked for times rather than frame numbers, and refused with a reason when broken."""

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

_SEEK = 2.0  # seconds: what lies further ahead is jumped to, what is nearer is decoded on the way
_EXACT = 1e-4  # seconds: two times that are one


class VideoReader(Protocol):
    """A video of which a view takes what it needs."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame's beginning to the last one's end. Raises BadSample."""
        ...

    @property
    def rate(self) -> float:
        """Frames a second, on average. Raises BadSample."""
        ...

    def frames_at(self, times: Sequence[float]) -> Tensor:
        """What is shown at ``times``, seconds from the beginning in any order: uint8 [T, 3, H, W], upright RGB. Before
        the beginning that is the first frame, after the end the last one. Raises BadSample."""
        ...


class FlowFilmReader(VideoReader, Protocol):
    """A video that knows what moves where."""

    def flow(self, times: Sequence[float]) -> Tensor:
        """By how many pixels what is shown at each of ``times`` has moved at the next one, to the right and down:
        float32 [T - 1, 2, H, W]. Raises BadSample."""
        ...


class _Facts(NamedTuple):
    duration: float
    rate: float


class EncodedVideo:
    """A video file, read by PyAV (FFmpeg). Frames of a variable rate are found by when they are shown.

    Args:
        path: of the file.

    Raises:
        DataError: PyAV is not installed (the extra ``video``).
    """

    def __init__(self, path: str | Path) -> None:
        if _missing is not None:
            raise DataError(f"videos need the extra 'video' (pip install -e '.[video]'): {_missing}")
        self.path = Path(path)
        self._facts: _Facts | None = None

    def __repr__(self) -> str:
        return f"EncodedVideo({self.path.name})"

    @property
    def duration(self) -> float:
        return self._header().duration

    @property
    def rate(self) -> float:
        return self._header().rate

    def frames_at(self, times: Sequence[float]) -> Tensor:
        order = np.argsort(times, kind="stable")
        found: dict[int, Tensor] = {}
        with self._opened() as (container, stream):
            reel = _Reel(container, stream)
            frame, picture = None, None
            for number in order:
                latest = reel.shown_at(float(times[number]))
                if latest is not frame:  # a held frame is converted once
                    frame, picture = latest, _upright(latest)
                assert picture is not None
                found[int(number)] = picture
        return torch.stack([found[number] for number in range(len(times))])

    def _header(self) -> _Facts:
        if self._facts is None:
            with self._opened() as (container, stream):
                rate = stream.average_rate or stream.guessed_rate
                length = None if stream.duration is None else float(stream.duration * stream.time_base)
                if length is None and container.duration is not None:
                    length = container.duration / av.time_base
                if not length or not rate:
                    raise BadSample("the video does not say how long it is: it may have no frame")
                self._facts = _Facts(length, float(rate))
        return self._facts

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise BadSample("there is no picture in it, only sound or text")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # the loader's workers have the cores
                yield container, stream
        except (av.error.FFmpegError, OSError) as error:
            raise BadSample(f"the video cannot be read: {error}") from error


class _Reel:
    """Frames in the order they are shown, forward only, with jumps."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.begin = float((stream.start_time or 0) * stream.time_base)
        self.frames = container.decode(stream)
        self.shown: Any = None
        self.next = next(self.frames, None)
        if self.next is None:
            raise BadSample("the video has no frame")

    def shown_at(self, time: float) -> Any:
        """The last frame that begins at or before ``time``, which must not be less than in the call before."""
        if self.next is not None and time - self._time(self.next) > _SEEK:
            self._jump(time)
        while self.next is not None and (self.shown is None or self._time(self.next) <= time + _EXACT):
            self.shown, self.next = self.next, next(self.frames, None)
        return self.shown

    def _jump(self, time: float) -> None:
        """To the last key frame before ``time``."""
        self.container.seek(round((time + self.begin) / self.stream.time_base), stream=self.stream)
        self.frames = self.container.decode(self.stream)
        key = next(self.frames, None)
        if key is not None:  # beyond the last key frame some files have nothing: what was shown before stays
            self.next = key

    def _time(self, frame: Any) -> float:
        return float(frame.time) - self.begin


def _upright(frame: Any) -> Tensor:
    """uint8 [3, H, W]; phones say how they were held in a matrix beside the frame."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

"""Encoded videos: frames are read by time rather than number, and broken videos are refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from src.datamodules.decoding import MAX_PIXELS, BadSample, DataError
from src.datamodules.regular_files import check_regular, reason

try:
    import av
    from av.sidedata.sidedata import Type as SideDataType
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None

_SEEK = 2.0  # seconds: farther frames are sought, nearer ones are reached by decoding
_SAME_TIME = 1e-4  # seconds: tolerance for equal times
_MISSING = 0.5  # seconds: a video that ends so much, and 5 %, before its header says is truncated
_ENOUGH = 8  # packets that tell a rate


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
    last: float  # start of the last frame, seconds from the start of the first one


class EncodedVideo:
    """A video file, decoded by PyAV (FFmpeg). Frames of a variable rate are found by their presentation time.

    Its duration is that of its pictures, by their packets: the duration in a file's header may be that of the sound, or
    count from another time than the first picture's, or be missing.

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
        header = self._read_header()
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
            if decoder.next is None:
                lost = min(header.last, float(times[order[-1]])) - decoder.time_of(frame)
                if lost > max(0.1, 3 / header.rate):
                    raise BadSample(f"the last {lost:.1f} s of the video's frames cannot be decoded")
        if len({pixels.shape for pixels in frames.values()}) > 1:
            raise BadSample("the video's frames change their size")
        return torch.stack([frames[number] for number in range(len(times))])

    def _read_header(self) -> _Header:
        if self._header is None:
            with self._opened() as (container, stream):
                self._header = self._measure(container, stream)
        return self._header

    def _measure(self, container: Any, stream: Any) -> _Header:
        """Measures the pictures by their first packet and those at the end of the file, which need no decoding.

        Raises:
            BadSample: there is no picture, or the file ends before its header says.
        """
        begin = next((_start(packet) for packet in container.demux(stream) if _start(packet) is not None), None)
        if begin is None:
            raise BadSample("the video has no frame")
        declared = _declared(container, stream)
        average = stream.average_rate or stream.guessed_rate
        rate = float(average) if average else None
        packets = None if declared is None else _packets_from(container, stream, declared.seek)
        if packets is None or packets.pictures < _ENOUGH or (not stream.frames and not _agree(rate, packets)):
            with self._opened() as (from_start, its_stream):
                packets = _packets_from(from_start, its_stream, None)
            if packets is not None and packets.last > packets.first:
                rate = (packets.pictures - 1) / (packets.last - packets.first)
        if packets is None or not rate:
            raise BadSample("the video has no frame, or no rate of frames")
        end = packets.end if packets.end > packets.last else packets.last + 1 / rate
        if declared is not None:
            ends = (
                (declared.of_stream, end - begin),
                (declared.of_file, max(end, packets.end_of_all) - declared.begin_of_file),
                (stream.frames / float(average) if stream.frames and average else None, end - begin),
            )
            missing = max(stated - read for stated, read in ends if stated is not None)
            if packets.cut or missing > _MISSING + 0.05 * (end - begin):
                raise BadSample(f"the video is truncated: its last {max(missing, 0):.1f} s are missing")
        return _Header(end - begin, rate, packets.last - begin)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        try:
            check_regular(self.path)
        except OSError as error:
            raise BadSample(f"the video cannot be read: {reason(error)}") from error
        try:
            with av.open(str(self.path), metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise BadSample("the file has no video stream, only sound or text")
                stream = container.streams.video[0]
                if stream.codec_context is None or not stream.time_base:
                    raise BadSample("the video is of an unknown kind")
                if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                    raise BadSample(f"the video's frames have more pixels than {MAX_PIXELS} (MAX_PIXELS)")
                stream.codec_context.thread_count = 1  # loader processes use the cores
                yield container, stream
        except (av.error.FFmpegError, OSError) as error:
            raise BadSample(f"the video cannot be read: {error}") from error


class _Packets(NamedTuple):
    """The times of the packets from a place in a file to its end, in seconds of the file's clock."""

    pictures: int  # number of them
    first: float  # start of the first picture
    last: float  # start of the last picture
    end: float  # end of the last picture
    end_of_all: float  # end of the last picture, sound or text
    cut: bool  # True if the file ends within a picture


class _Declared(NamedTuple):
    """The times in a file's header, in seconds; None for one that is missing."""

    of_stream: float | None  # duration of the pictures
    of_file: float | None  # duration of everything
    begin_of_file: float
    seek: int  # the end, in units of the stream


def _declared(container: Any, stream: Any) -> _Declared | None:
    of_stream = None if stream.duration is None else float(stream.duration * stream.time_base)
    of_file = None if container.duration is None else container.duration / av.time_base
    longest = of_stream if of_stream is not None else of_file
    if longest is None:
        return None
    begin = float((stream.start_time or 0) * stream.time_base)
    return _Declared(
        of_stream, of_file, (container.start_time or 0) / av.time_base, round((begin + longest) / stream.time_base)
    )


def _packets_from(container: Any, stream: Any, place: int | None) -> _Packets | None:
    """Reads the packets from the last key frame before ``place``, in units of the stream, or from where the file is for
    None; returns None if there is no picture among them, or the file cannot seek."""
    if place is not None:
        try:
            container.seek(place, stream=stream)
        except (av.error.FFmpegError, OSError, OverflowError):
            return None
    starts: list[float] = []
    end = end_of_all = float("-inf")
    cut = False
    for packet in container.demux():
        start = _start(packet)
        if start is None:
            continue
        end_of_all = max(end_of_all, start + float((packet.duration or 0) * packet.time_base))
        if packet.stream.index == stream.index:
            starts.append(start)
            end = max(end, start + float((packet.duration or 0) * packet.time_base))
            cut = bool(packet.is_corrupt)
    return _Packets(len(starts), min(starts), max(starts), end, end_of_all, cut) if starts else None


def _start(packet: Any) -> float | None:
    """Returns when a packet's picture or sound starts, in seconds; None for the empty packet at the end, and for one
    that is not shown."""
    ticks = packet.pts if packet.pts is not None else packet.dts
    if ticks is None or not packet.size or packet.is_discard or not packet.time_base:
        return None
    return float(ticks * packet.time_base)


def _agree(rate: float | None, packets: _Packets) -> bool:
    """Returns True if a header's rate is about that of its packets: files of variable rate often state a wrong one."""
    if rate is None or packets.last <= packets.first:
        return False
    return 2 / 3 < rate * (packets.last - packets.first) / (packets.pictures - 1) < 3 / 2


class _ForwardDecoder:
    """Decodes frames in the order of their presentation, forward only, with seeks. Times are relative to the first
    frame, whose own time need not be 0."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.begin = 0.0
        self.seeks = True
        self.frames = container.decode(stream)
        self.current: Any = None
        self.next = next(self.frames, None)
        if self.next is None:
            raise BadSample("the video has no frame")
        self.begin = self.time_of(self.next)

    def frame_at(self, time: float) -> Any:
        """Returns the last frame that starts at or before ``time``, which must not decrease between calls."""
        if self.seeks and self.next is not None and time - self.time_of(self.next) > _SEEK:
            self._seek(time)
        while self.next is not None and (self.current is None or self.time_of(self.next) <= time + _SAME_TIME):
            self.current, self.next = self.next, next(self.frames, None)
        return self.current

    def time_of(self, frame: Any) -> float:
        """Returns the start of a frame, in seconds from the start of the first one."""
        if frame.time is None:
            raise BadSample("a frame of the video has no time")
        return float(frame.time) - self.begin

    def _seek(self, time: float) -> None:
        """Seeks to the last key frame before ``time``, or to the start, where a file's seek leads past ``time``."""
        key = self._first_after(time)
        if key is None or self.time_of(key) > time + _SAME_TIME:
            self.seeks = False
            key = self._first_after(0.0)
            if key is None or self.time_of(key) > _SAME_TIME:
                raise BadSample("the video can be read only once from its start")
        self.next = key

    def _first_after(self, time: float) -> Any:
        """Seeks, and returns the first frame that is decoded there; None if there is none."""
        self.container.seek(round((time + self.begin) / self.stream.time_base), stream=self.stream)
        self.frames = self.container.decode(self.stream)
        return next(self.frames, None)


def _upright(frame: Any) -> Tensor:
    """Converts a frame to upright uint8 [3, H, W]; phones store their orientation, and some that they mirror, as a
    display matrix of the frame."""
    if frame.width * frame.height > MAX_PIXELS:
        raise BadSample(f"a frame of the video has more pixels than {MAX_PIXELS} (MAX_PIXELS)")
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is not None:
        # a pixel at (x, y) is shown at (a x + c y, b x + d y)
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 2), c, b
        pixels = pixels.flip([axis for axis, sign in ((2, a), (1, d)) if sign < 0])
    return pixels.contiguous()

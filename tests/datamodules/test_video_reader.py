"""Video files of a few frames: frames by time, and errors."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from src.datamodules import video_reader as footage
from src.datamodules.decoding import BadSample
from src.datamodules.video_reader import EncodedVideo

SIZE = (48, 64)


def write(
    path: Path,
    times: list[float],
    *,
    keys: int = 12,
    base: int = 600,
    sound: float = 0.0,
    seekable: bool = True,
    options: dict[str, str] | None = None,
) -> Path:
    """Frame n has gray level 10 n and a black left half; it starts at ``times[n]``. ``sound`` seconds of silence."""
    target = str(path) if seekable else Unseekable(path)
    with av.open(target, "w", format=None if seekable else "matroska", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=Fraction(base))
        if sound:
            silence = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.time_base = Fraction(1, base)
        stream.options = {"crf": "1", "g": str(keys), "preset": "ultrafast"}
        for number, time in enumerate(times):
            pixels = np.full((*SIZE, 3), min(250, 10 * number), np.uint8)
            pixels[:, : SIZE[1] // 2] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * base), Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            container.mux(silence.encode(quiet(sound)))
            container.mux(silence.encode())
    return path


def quiet(seconds: float) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, round(8000 * seconds)), np.int16), layout="mono")
    frame.rate = 8000
    return frame


class Unseekable:
    """A pipe: a file whose header cannot be completed at its end."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.write = self.file.write


def levels(video: EncodedVideo, times: list[float]) -> list[int]:
    frames = video.frames_at(times)
    return [round(float(frame[:, :, SIZE[1] * 3 // 4].float().mean()) / 10) for frame in frames]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> EncodedVideo:
    """20 frames at 10 a second."""
    return EncodedVideo(write(tmp_path_factory.mktemp("videos") / "even.mp4", [n / 10 for n in range(20)]))


def test_a_frame_lasts_until_the_next_one_starts(even: EncodedVideo) -> None:
    assert levels(even, [0.0, 0.05, 0.0999, 0.1, 0.55, 1.9]) == [0, 0, 1, 1, 5, 19]
    assert even.frames_at([0.3]).shape == (1, 3, *SIZE)
    assert even.rate == pytest.approx(10, rel=0.1)
    assert even.duration == pytest.approx(2.0, abs=0.1)


def test_times_in_any_order_repeated_and_beyond_both_ends(even: EncodedVideo) -> None:
    assert levels(even, [1.2, 0.4, 1.2, -3.0, 99.0]) == [12, 4, 12, 0, 19]


def test_frames_of_a_variable_rate_are_found_by_their_times(tmp_path: Path) -> None:
    video = EncodedVideo(write(tmp_path / "odd.mp4", [0.0, 0.1, 0.2, 1.5, 1.6, 3.0, 3.1]))
    assert levels(video, [0.15, 1.4, 1.55, 2.9, 3.05]) == [1, 2, 3, 4, 5]


def test_seeking_gives_the_same_frames_as_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mkv", [n / 4 for n in range(24)], keys=4)
    times = [0.3, 2.6, 5.5]
    straight = EncodedVideo(path).frames_at(times)
    jumps: list[float] = []
    jump = footage._ForwardDecoder._seek

    def counted(reel: footage._ForwardDecoder, time: float) -> None:
        jumps.append(time)
        jump(reel, time)

    monkeypatch.setattr(footage._ForwardDecoder, "_seek", counted)
    monkeypatch.setattr(footage, "_SEEK", 0.5)
    assert torch.equal(EncodedVideo(path).frames_at(times), straight)
    assert jumps == [2.6, 5.5]
    assert levels(EncodedVideo(path), times) == [1, 10, 22]


ONE = 1 << 16
WIDTH, HEIGHT = SIZE[1] * ONE, SIZE[0] * ONE


@pytest.mark.parametrize(
    ("matrix", "black"),
    [
        ((0, ONE, 0, -ONE, 0, 0, HEIGHT, 0), "top"),  # shown a quarter clockwise
        ((0, -ONE, 0, ONE, 0, 0, 0, WIDTH), "bottom"),
        ((-ONE, 0, 0, 0, -ONE, 0, WIDTH, HEIGHT), "right"),
        ((-ONE, 0, 0, 0, ONE, 0, WIDTH, 0), "right"),  # mirrored left to right, as some phones' front cameras
        ((ONE, 0, 0, 0, -ONE, 0, 0, HEIGHT), "left"),  # mirrored top to bottom
        ((0, ONE, 0, ONE, 0, 0, 0, 0), "top"),  # mirrored at the diagonal
        ((0, -ONE, 0, -ONE, 0, 0, HEIGHT, WIDTH), "bottom"),
    ],
)
def test_a_turned_or_mirrored_video_is_shown_upright(matrix: tuple[int, ...], black: str, tmp_path: Path) -> None:
    path = write(tmp_path / "phone.mp4", [0.0, 0.1])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # of a version 0 header: the matrix
    data[at : at + 36] = struct.pack(">9i", *matrix, 1 << 30)
    path.write_bytes(data)
    frame = EncodedVideo(path).frames_at([0.1])[0].float()
    assert frame.shape == (3, *(SIZE if black in ("left", "right") else SIZE[::-1]))
    edges = {"left": frame[..., :8], "right": frame[..., -8:], "top": frame[:, :8], "bottom": frame[:, -8:]}
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[black]
    assert edges[black].mean() < 3 < 8 < edges[opposite].mean() < 12


TIMES = [n / 10 for n in range(16)]


class TestDuration:
    def test_sound_that_is_longer_than_the_pictures_adds_no_frozen_frame(self, tmp_path: Path) -> None:
        video = EncodedVideo(write(tmp_path / "long.mkv", TIMES, sound=6.0))
        assert (video.duration, video.rate) == (pytest.approx(1.6, abs=0.1), pytest.approx(10))
        assert levels(video, [0.0, 0.8, 1.5]) == [0, 8, 15]

    def test_times_count_from_the_first_frame(self, tmp_path: Path) -> None:
        video = EncodedVideo(write(tmp_path / "late.mkv", [5 + time for time in TIMES], sound=1.0))
        assert video.duration == pytest.approx(1.6, abs=0.1)
        assert levels(video, [0.0, 0.8, 1.5]) == [0, 8, 15]

    def test_a_file_without_a_duration_plays(self, tmp_path: Path) -> None:
        path = write(tmp_path / "piped.mkv", TIMES, seekable=False)
        with av.open(str(path)) as container:
            assert container.duration is None
        video = EncodedVideo(path)
        assert (video.duration, video.rate) == (pytest.approx(1.6, abs=0.1), pytest.approx(10))
        assert levels(video, [0.0, 0.8, 1.5]) == [0, 8, 15]

    def test_a_wrong_rate_in_the_header_is_not_believed(self, tmp_path: Path) -> None:
        """As recorders in browsers state 1,000 frames a second."""
        path = write(tmp_path / "browser.mkv", TIMES, base=1000)
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 1000
        assert EncodedVideo(path).rate == pytest.approx(10)

    @pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4", "cut.avi"])
    def test_a_truncated_video_is_refused(self, name: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, [n / 10 for n in range(40)], keys=5, base=10, options={"movflags": "faststart"})
        assert EncodedVideo(path).duration == pytest.approx(4.0, abs=0.2)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])
        with pytest.raises(BadSample, match=r"the video is truncated: its last [1-3]\.\d s are missing"):
            EncodedVideo(path).duration  # noqa: B018

    def test_a_seek_past_the_wanted_frame_is_not_believed(self, tmp_path: Path, monkeypatch: Any) -> None:
        """A transport stream has no index: a seek may lead to where no frame can be decoded."""
        video = EncodedVideo(write(tmp_path / "broadcast.ts", [n / 4 for n in range(16)], keys=16))
        monkeypatch.setattr(footage, "_SEEK", 0.3)
        assert levels(video, [0.0, 2.0, 3.5]) == [0, 8, 14]

    def test_frames_that_cannot_be_decoded_are_not_replaced_by_the_last_one(self, tmp_path: Path) -> None:
        path = write(tmp_path / "torn.mkv", [n / 10 for n in range(40)], keys=10)
        with av.open(str(path)) as container:
            packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        data, at = bytearray(path.read_bytes()), 0
        for number, packet in enumerate(packets):
            at = data.index(packet, at) + len(packet)
            if number >= 20:
                data[at - len(packet) : at] = bytes(len(packet))
        path.write_bytes(data)
        assert levels(EncodedVideo(path), [0.5, 1.0]) == [5, 10]
        with pytest.raises(BadSample, match="cannot be"):
            EncodedVideo(path).frames_at([0.5, 3.5])


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name, reason in (("pipe.mp4", "a named pipe"), ("loop.mp4", "symbolic links"), ("", "a directory, not a file")):
        with pytest.raises(BadSample, match=f"the video cannot be read: .*{reason}"):
            EncodedVideo(tmp_path / name).duration  # noqa: B018


def test_files_that_are_no_videos_are_bad_samples_with_a_reason(tmp_path: Path, even: EncodedVideo) -> None:
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        container.mux(stream.encode(quiet(0.1)))
        container.mux(stream.encode())
    with pytest.raises(BadSample, match="no video stream"):
        EncodedVideo(sound).frames_at([0.0])
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(BadSample, match="cannot be read"):
        EncodedVideo(noise).duration  # noqa: B018
    with pytest.raises(BadSample, match="cannot be read"):
        EncodedVideo(tmp_path / "missing.mp4").frames_at([0.0])
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(even.path.read_bytes()[:900])
    with pytest.raises(BadSample):
        EncodedVideo(cut).frames_at([0.0])

"""Video files of a few frames: frames by time, and errors."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from src.datamodules import video_reader as footage
from src.datamodules.decoding import BadSample
from src.datamodules.video_reader import EncodedVideo

SIZE = (48, 64)


def write(path: Path, times: list[float], *, keys: int = 12, base: int = 600) -> Path:
    """Frame n has gray level 10 n and a black left half; it starts at ``times[n]``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(base))
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
    return path


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


def test_a_rotated_video_is_turned_upright(tmp_path: Path) -> None:
    path = write(tmp_path / "phone.mp4", [0.0, 0.1])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # of a version 0 header: the matrix
    one = 1 << 16
    data[at : at + 36] = struct.pack(
        ">9i", 0, one, 0, -one, 0, 0, SIZE[0] * one, 0, 1 << 30
    )  # shown a quarter clockwise
    path.write_bytes(data)
    frame = EncodedVideo(path).frames_at([0.1])[0]
    assert frame.shape == (3, SIZE[1], SIZE[0])
    # what was at the left is now at the top
    assert frame[:, :8].float().mean() < 3 < 8 < frame[:, -8:].float().mean() < 12


def test_files_that_are_no_videos_are_bad_samples_with_a_reason(tmp_path: Path, even: EncodedVideo) -> None:
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
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

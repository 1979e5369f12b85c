"""Measures clips per second and core from a folder of videos, beside a plain PyAV loop, and the growth of memory."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import theilslopes
from torch import Tensor
from torch.nn import functional as F

from benchmarks.input_pipeline import photo_like
from src.datamodules.datamodule import IMAGENET_MEAN, IMAGENET_STD, DataModule
from src.datamodules.sources.video_folder import VideoFolderSource
from src.datamodules.views.video import CenterVideoCrop, DenseClip, MultiScaleCrop, RandomVideoCrop
from src.image_size import height_and_width
from src.measure.paired_ratio import paired_ratio
from src.measure.report import Check, Section, table
from src.measure.subprocess_runner import run_in_subprocess

WANTED = 1.0
GROWTH = 32.0  # MB that an allocator may keep without a leak
HEIGHT, WIDTH, RATE, SECONDS = 240, 320, 30, 10
CLIP = DenseClip(frames=16, stride=4)
CROP = MultiScaleCrop(size=224)
_BATCH = 8


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures reading and decoding 16 frames with stride 4, crop, flip and normalization to float32 in both loops.

    Both run in this process on one thread, in alternating passes over the same generated files (in the page cache):
    10 s of 320x240 at 30 frames per second, H.264 with x264's defaults. The plain loop seeks to its clip, too.

    Returns:
        ``clips_per_second`` and ``plain_clips_per_second`` as medians, their paired ``ratio``, and ``growth_mb`` of
        a process over ``clips``, see `growth_over`.
    """
    count, passes = (_BATCH, 2) if quick else (3 * _BATCH, 9)
    clips = 200 if quick else 2000
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_videos(Path(folder), count)
            ours, plain = _ours(folder), _plain(folder)
            ours(0), plain(0)
            seconds: dict[str, list[float]] = {"ours": [], "plain": []}
            for number in range(passes):
                pair: list[tuple[str, Callable[[int], object]]] = [("ours", ours), ("plain", plain)]
                for name, run in pair if number % 2 else reversed(pair):
                    begin = time.perf_counter()
                    run(number)
                    seconds[name].append((time.perf_counter() - begin) / count)
            growth = run_in_subprocess(growth_over, folder, clips)
    finally:
        torch.set_num_threads(threads)
    return {
        "clips_per_second": 1 / median(seconds["ours"]),
        "plain_clips_per_second": 1 / median(seconds["plain"]),
        "ratio": asdict(paired_ratio(seconds["plain"], seconds["ours"])),
        "clips": clips,
        "growth_mb": growth,
    }


def growth_over(folder: str, clips: int) -> float:
    """Returns by how many MB a process grows over ``clips``: the trend of its resident size after the first passes,
    because single sizes vary by a batch."""
    torch.set_num_threads(1)
    run = _ours(folder)
    per_pass = run(0)
    run(1)
    passes = -(-clips // per_pass)
    sizes = []
    for number in range(passes):
        run(2 + number)
        sizes.append(_resident())
    return trend(sizes)


def trend(sizes: Sequence[float]) -> float:
    """Returns the growth from the first to the last size by the Theil-Sen slope, the median over all pairs."""
    return float(theilslopes(sizes)[0]) * (len(sizes) - 1)


def _resident() -> float:
    """Returns the resident size in MB; on systems without /proc, its largest value so far."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def write_videos(folder: Path, count: int) -> None:
    """Writes ``folder/train/pan/*.mp4`` and one validation video: a camera pans over an image like a photograph."""
    import av

    for split, videos in (("train", count), ("val", 1)):
        (folder / split / "pan").mkdir(parents=True)
        for number in range(videos):
            picture = np.asarray(photo_like(2 * HEIGHT, 2 * WIDTH, number))
            with av.open(str(folder / split / "pan" / f"{number:03d}.mp4"), "w") as container:
                stream: Any = container.add_stream("libx264", rate=Fraction(RATE))
                stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
                stream.options = {"preset": "veryfast"}
                for frame in range(RATE * SECONDS):
                    place = 0.5 - 0.5 * np.cos(2 * np.pi * frame / (RATE * SECONDS))
                    top, left = round(HEIGHT * place), round(WIDTH * place * place)
                    pixels = np.ascontiguousarray(picture[top : top + HEIGHT, left : left + WIDTH])
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode())


def _ours(folder: str) -> Callable[[int], int]:
    """Returns a function that reads all videos once in random order with the DataModule, and returns their number."""
    data = DataModule(
        source=partial(VideoFolderSource, root=folder),
        train_view=RandomVideoCrop(CLIP, CROP),
        eval_view=CenterVideoCrop(CLIP, CROP.size),
        batch_size=_BATCH,
        num_workers=0,
    )
    loader = data.train_dataloader()

    def run(epoch: int) -> int:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return sum(len(data.on_after_batch_transfer(batch, 0)["video"]) for batch in loader)

    return run


def _plain(folder: str) -> Callable[[int], int]:
    """Returns a function that reads the same clips and crops without the DataModule."""
    files = sorted(Path(folder, "train", "pan").glob("*.mp4"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def run(epoch: int) -> int:
        draw = np.random.default_rng(epoch)
        clips = []
        for file in files:
            start = int(draw.random() * (RATE * SECONDS - CLIP.stride * (CLIP.frames - 1)))
            frames = torch.stack(list(_frames(file, start)))
            top, left, rows, columns = CROP.boxes(HEIGHT, WIDTH, draw.random((1, CROP.num_uniforms)))[0].astype(int)
            part = frames[..., top : top + rows, left : left + columns].float()
            clip = F.interpolate(part, height_and_width(CROP.size), mode=CROP.interpolation, antialias=True).clamp(
                0, 255
            )
            clips.append((clip.flip(-1) if draw.random() < CROP.flip else clip).div_(255).sub_(mean).div_(std))
        batches = torch.stack(clips).split(_BATCH)
        return sum(len(batch) for batch in batches)

    return run


def _frames(file: Path, start: int) -> Iterator[Tensor]:
    import av

    wanted = set(range(start, start + CLIP.stride * CLIP.frames, CLIP.stride))
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        container.seek(round(start / RATE / stream.time_base), stream=stream)  # type: ignore[operator]
        for frame in container.decode(stream):
            number = round(float(frame.time) * RATE)
            if number in wanted:
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            if number >= max(wanted):
                return


def report(result: dict[str, Any]) -> Section:
    ratio, growth = result["ratio"]["median"], result["growth_mb"]
    checks = [
        Check("clips of a folder of videos over a plain PyAV loop", f"≥ {WANTED}", f"{ratio:.2f}", ratio >= WANTED),
        Check(f"growth over {result['clips']:,} clips, MB", f"≤ {GROWTH:.0f}", f"{growth:.0f}", growth <= GROWTH),
    ]
    rows = [
        [
            f"{result['clips_per_second']:.1f}",
            f"{result['plain_clips_per_second']:.1f}",
            f"{ratio:.2f} ({result['ratio']['low']:.2f} to {result['ratio']['high']:.2f})",
            f"{growth:.0f}",
        ]
    ]
    body = (
        "Clips per second and core: 16 frames with stride 4 from 10 s of 320x240 H.264, decoded by PyAV, cropped to "
        "224 and normalized, by the DataModule and by a plain loop. Median of alternating passes on one thread. "
        "Growth is the trend of the process's resident size.\n\n"
        + table(["ours", "plain loop", "ratio (quartiles)", "growth, MB"], rows)
    )
    return Section("Videos", checks, body)

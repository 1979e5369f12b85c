"""Measures images per second and core from a folder of JPEGs, by this pipeline and by torchvision's ImageFolder."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from src.datamodules.datamodule import IMAGENET_MEAN, IMAGENET_STD
from src.datamodules.sources.image_folder import ImageFolderSource
from src.datamodules.views.image import RandomResizedCrop
from src.randomness import uniform

_CROP = 224
_SCALE = (0.2, 1.0)


def measure(repetitions: int = 15) -> dict[str, dict[str, float]]:
    """Measures reading, decoding, RandomResizedCrop(224, bicubic), flip and normalization to float32 in both pipelines.

    Both run in this process on one thread, in alternating passes over the same files (in the page cache): generated
    images with the spectrum of photographs, JPEG quality 90.

    Returns:
        For small (500x375) and large (2000x1500) images the medians of images per second, ``ours`` and
        ``torchvision``, the median of their paired ``ratio``, and ``bits_per_pixel`` of the files.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return {
                "500x375": _compare(Path(folder, "small"), 375, 500, count=60, repetitions=repetitions),
                "2000x1500": _compare(Path(folder, "large"), 1500, 2000, count=10, repetitions=repetitions),
            }
    finally:
        torch.set_num_threads(threads)


def photo_like(height: int, width: int, seed: int) -> Image.Image:
    """Returns noise with the spectrum of photographs (amplitude 1/frequency, blurred by a lens), mostly grey with some
    color. As JPEG of quality 90 it takes 2.7 to 2.9 bits per pixel, detailed real photographs 1.4 to 2.9."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0 / max(height, width)

    def spectrum(power: float) -> np.ndarray[Any, Any]:
        return np.exp(-((frequency / 0.5) ** 2)) / frequency**power

    def field(power: float) -> np.ndarray[Any, Any]:
        shape = (height, width // 2 + 1)
        values = np.fft.irfft2(
            spectrum(power) * (draw.normal(size=shape) + 1j * draw.normal(size=shape)), (height, width)
        )
        return (values - values.mean()) / values.std()

    brightness = field(1.2)
    pixels = np.stack([128 + 45 * (brightness + 0.2 * field(1.4)) for _ in range(3)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _compare(root: Path, height: int, width: int, *, count: int, repetitions: int) -> dict[str, float]:
    for split in ("train", "val"):
        (root / split / "photo").mkdir(parents=True)
    for number in range(count):
        photo_like(height, width, number).save(root / "train" / "photo" / f"{number:03d}.jpg", quality=90)
    photo_like(32, 32, count).save(root / "val" / "photo" / "0.jpg")
    size = sum(path.stat().st_size for path in (root / "train").rglob("*.jpg"))
    ours, theirs = _ours(root), _torchvision(root)
    ours(0), theirs(0)
    speeds: dict[str, list[float]] = {"ours": [], "torchvision": []}
    for repetition in range(repetitions):
        pair: list[tuple[str, Callable[[int], None]]] = [("ours", ours), ("torchvision", theirs)]
        for name, run in pair if repetition % 2 else reversed(pair):
            start = time.perf_counter()
            run(repetition)
            speeds[name].append(count / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["torchvision"], strict=True)]
    return {
        "ours": statistics.median(speeds["ours"]),
        "torchvision": statistics.median(speeds["torchvision"]),
        "ratio": statistics.median(ratios),
        "bits_per_pixel": 8 * size / (count * height * width),
    }


def _ours(root: Path) -> Callable[[int], None]:
    source = ImageFolderSource("train", root=root)
    view = RandomResizedCrop(size=_CROP, scale=_SCALE)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)

    def run(epoch: int) -> None:
        indices = range(len(source))
        numbers = uniform(0, [epoch] * len(source), indices, view.num_uniforms)
        for index in indices:
            image = view.from_encoded(source[index]["image"], numbers[index])["image"]  # type: ignore[arg-type]
            _use(image.contiguous().to(torch.float32).div_(255).sub_(mean).div_(std))

    return run


def _torchvision(root: Path) -> Callable[[int], None]:
    folder = ImageFolder(
        str(root / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(_CROP, _SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        ),
    )

    def run(epoch: int) -> None:
        torch.manual_seed(epoch)
        for index in range(len(folder)):
            _use(folder[index][0])

    return run


def _use(image: Tensor) -> None:
    assert image.shape == (3, _CROP, _CROP)
    assert image.dtype == torch.float32


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))

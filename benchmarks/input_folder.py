"""Compares the input pipeline with torchvision's, and decoding at a reduced scale with full decoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import input_pipeline
from src.datamodules.decoding import EncodedImage
from src.measure.report import Check, Section, table

WANTED = {"500x375": 1.0, "2000x1500": 2.0}


def measure(quick: bool = False) -> dict[str, Any]:
    """Returns the result of `input_pipeline.measure`, and the mean and largest difference (of 255 levels) between large
    images decoded at a reduced scale and decoded in full."""
    return {
        "sizes": input_pipeline.measure(repetitions=2 if quick else 15),
        "difference": difference(count=1 if quick else 8),
    }


def difference(count: int) -> dict[str, float]:
    """Compares `EncodedImage.decode` with a full decode of the same box and interpolation, over ``count`` images of
    2000x1500 and boxes of 2.1 to 6 times the target side."""
    differences = []
    draw = np.random.default_rng(0)
    for seed in range(count):
        file = io.BytesIO()
        input_pipeline.photo_like(1500, 2000, seed).save(file, "JPEG", quality=90)
        side = float(round(draw.uniform(2.1, 6.0) * 224))
        top, left = draw.uniform(0, 1500 - side), draw.uniform(0, 2000 - side)
        ours = EncodedImage(file.getvalue()).decode((top, left, side, side), (224, 224))
        full = Image.open(file).resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        differences.append(np.abs(np.asarray(ours, np.float64) - np.asarray(full, np.float64)))
    return {"mean": float(np.mean(differences)), "largest": float(np.max(differences))}


def report(result: dict[str, Any]) -> Section:
    rows, checks = [], []
    for size, wanted in WANTED.items():
        speeds = result["sizes"][size]
        rows.append(
            [
                size,
                f"{speeds['bits_per_pixel']:.2f}",
                f"{speeds['ours']:.1f}",
                f"{speeds['torchvision']:.1f}",
                f"{speeds['ratio']:.2f}",
            ]
        )
        checks.append(
            Check(
                f"JPEG folder over torchvision's, {size}",
                f"≥ {wanted}",
                f"{speeds['ratio']:.2f}",
                speeds["ratio"] >= wanted,
            )
        )
    difference = result["difference"]
    body = (
        "Images per second and core: read, decode, RandomResizedCrop to 224, flip, normalize; generated images "
        "with the spectrum of photographs. Median of alternating passes on one thread.\n\n"
        + table(["images", "bits per pixel", "ours", "torchvision", "ratio"], rows)
        + "\n\nLarge images are decoded at half, a quarter or an eighth of their size where the crop allows. Against "
        f"a full decode of 2000x1500 the pixels differ by {difference['mean']:.1f} of 255 levels on average, by "
        f"{difference['largest']:.0f} at most (for noise up to the highest frequency; far less for smooth images)."
    )
    return Section("Input pipeline", checks, body)

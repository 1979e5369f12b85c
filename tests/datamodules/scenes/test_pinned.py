"""Scenes, films and captions stay what they were when results were measured. A failure means that stored results no
longer belong to this data: change the values here only together with every measurement."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from src.datamodules.scenes.films import FilmsSource
from src.datamodules.scenes.source import ScenesSource, SceneTexts
from src.datamodules.scenes.world import ObjectsWorld

WORLD = ObjectsWorld(others=(0, 3), plain=0.2)


def quarters(image: np.ndarray) -> np.ndarray:
    """Means of the four quarters of a uint8 image [3, 32, 32], channel by channel: [12]."""
    return image.astype(np.float64).reshape(3, 2, 16, 2, 16).mean((2, 4)).ravel()


@pytest.mark.parametrize(
    ("style", "checksum"),
    [("short", "5f6e58c7d1d56d80"), ("long", "4c877f246212e908"), ("alt", "9e4a4e4ef67e437b")],
)
def test_texts(style: str, checksum: str) -> None:
    """Every caption, region text and hard negative of forty scenes."""
    texts = SceneTexts(style=style, mismatched=0.3, dropped=0.2, junk=0.3, places=True)  # type: ignore[arg-type]
    source = ScenesSource("train", count=40, resolution=16, seed=2, world=WORLD, texts=texts)
    found: list[str] = []
    for index in range(40):
        found += [source.caption(index, choice) for choice in (0.0, 0.31, 0.77)]
        found += [*source.captions(index), *source.regions(index, 0.4)]
        found += [text for negative in source.mistakes(index) for text in (negative.right, negative.wrong)]
    assert len(found) == 641
    assert hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] == checksum


@pytest.mark.parametrize(
    ("index", "label", "means"),
    [
        (0, 2, [158.38, 166.61, 144.58, 151.47, 134.72, 142.32, 123.01, 132.79, 126.71, 130.38, 117.33, 125.82]),
        (1, 1, [124.5, 104.34, 107.14, 115.51, 132.63, 116.8, 115.41, 126.99, 141.96, 126.3, 124.04, 136.64]),
        (2, 7, [143.21, 103.23, 115.04, 109.77, 145.3, 101.13, 117.19, 113.35, 178.91, 126.53, 148.37, 148.06]),
    ],
)
def test_images(index: int, label: int, means: list[float]) -> None:
    """Means and no checksum, because libraries round single pixels differently on other CPUs."""
    sample = ScenesSource("train", count=40, resolution=32, seed=2, world=WORLD)[index]
    assert sample["label"] == label
    np.testing.assert_allclose(quarters(np.asarray(sample["image"])), means, atol=0.03)


def test_a_film() -> None:
    means = [143.73, 166.61, 131.37, 158.38, 142.84, 164.54, 127.28, 156.13, 139.57, 160.5, 121.83, 151.39]
    source = FilmsSource("val", count=3, resolution=32, duration=1.0)
    assert source[1]["label"] == 0
    np.testing.assert_allclose(quarters(source.films.frame(source.film(1), 7)), means, atol=0.03)

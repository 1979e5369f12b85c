"""The comparison's images are like photographs, and both sides do the same work."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import input_pipeline
from benchmarks.input_pipeline import photo_like


def test_pictures_compress_and_fall_off_like_photographs() -> None:
    image = photo_like(375, 500, 0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    assert 2.2 < 8 * len(buffer.getvalue()) / (375 * 500) < 3.2
    grey = np.asarray(image.convert("L"), float)
    amplitude = np.abs(np.fft.rfft(grey - grey.mean(), axis=1)).mean(axis=0)
    slope = np.polyfit(np.log(np.arange(4, 64)), np.log(amplitude[4:64]), 1)[0]
    assert -1.3 < slope < -0.5  # a row through 1/f^1.2 in two dimensions falls with about 1/f^0.7
    assert photo_like(8, 8, 1).tobytes() == photo_like(8, 8, 1).tobytes()
    assert photo_like(8, 8, 1).tobytes() != photo_like(8, 8, 2).tobytes()


def test_both_sides_make_the_same_tensor_of_the_same_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square image and whole-area boxes leave one choice: the whole image, then a mirror or none."""
    for split in ("train", "val"):
        (tmp_path / split / "photo").mkdir(parents=True)
        photo_like(300, 300, 0).save(tmp_path / split / "photo" / "0.jpg", quality=90)
    monkeypatch.setattr(input_pipeline, "_SCALE", (1.0, 1.0))
    seen: dict[str, list[Tensor]] = {"ours": [], "torchvision": []}
    for name, make in (("ours", input_pipeline._ours), ("torchvision", input_pipeline._torchvision)):
        monkeypatch.setattr(input_pipeline, "_use", seen[name].append)
        run = make(tmp_path)
        for epoch in range(6):
            run(epoch)
    whole = [image for images in seen.values() for image in images]
    reference = whole[0]
    matches = [min((image - other).abs().max() for other in (reference, reference.flip(-1))) for image in whole]
    assert torch.stack(matches).max() < 0.05  # two of 255 levels after normalization are 0.035

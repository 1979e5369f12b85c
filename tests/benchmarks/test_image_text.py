"""What image-text training costs, measured small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import image_text, shards
from benchmarks.bare import BareLoop, RandomImageSource
from src.datamodules.datamodule import IMAGENET_MEAN, IMAGENET_STD
from src.measure import subprocess_runner


def test_a_bare_loop_gives_each_picture_its_own_text() -> None:
    source = RandomImageSource("train", size=4, length=6)
    ids, mask = torch.arange(12).view(6, 2), torch.ones(6, 2, dtype=torch.bool)
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Reader(torch.nn.Module):
        optimizer_recipe = type("Recipe", (), {"lr": 0.1})

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": [self.weight], "lr_multiplier": 1.0}], lr=0.1)

        def teacher_pairs(self) -> list[Any]:
            return []

        def training_step(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
            assert batch["text_mask"].all()
            read.append((batch["image"], batch["text"]))
            return {"loss": self.weight}

    BareLoop(Reader(), source.distinct_images, batch_size=3, precision="32-true", texts=(ids, mask)).run(2)  # type: ignore[arg-type]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for images, texts in read:
        for image, text in zip(images, texts, strict=True):
            torch.testing.assert_close(
                image, (torch.from_numpy(source.distinct_images[text[0] // 2]) / 255 - mean) / std
            )


def test_pictures_of_noise_have_distinct_texts() -> None:
    source = RandomImageSource("train", size=1, length=1000, distinct=100)
    assert len({source.caption(index, 0.3) for index in range(1000)}) == 100
    assert source.captions(7) == source.captions(107) == (source.caption(7, 0.9),)


@pytest.mark.parametrize(("title", "batch", "each"), [("CLIP", 16384, 1), ("SigLIP", 16384, 1), ("FILIP", 2048, 64)])
def test_a_loss_of_many_pairs_needs_less_than_its_rows_of_similarities(title: str, batch: int, each: int) -> None:
    cost = subprocess_runner.run_in_subprocess(image_text.loss_cost, title, batch)
    held = 2 * 4 * (batch * image_text.DIM) * 4 / 1e6  # both sides: given, joined, two gradients
    assert 0 < cost["megabytes"] < held + batch**2 * each / image_text.PROCESSES * 4 / 1e6 / 2
    assert cost["seconds"] > 0


def test_the_page_says_what_a_step_and_its_tokens_take() -> None:
    arm = {
        "images_per_second": 640.0,
        "bare_images_per_second": 800.0,
        "ratio": {"median": 0.8, "low": 0.79, "high": 0.81},
        "batch_size": 128,
    }
    costs = {"1024": {"megabytes": 3.0, "seconds": 0.25}, "2048": {"megabytes": 600.0, "seconds": 0.5}}
    files = {"folder": 100.0, "shards": 104.0, "ratio": 1.04}
    section = image_text.report(
        {"loops": {"CLIP": arm}, "losses": {"CLIP": costs}, "tokens": 12_800.0, "shards": files}
    )
    assert "| CLIP | 128 | 200 ms | 160 ms | 0.800 (0.790 to 0.810) | 5.0 % |" in section.body
    assert "| 1,024 | 3 | 0.25 |" in section.body
    assert [check.met for check in section.checks] == [False, False, True]  # 2048 * 256 similarities are 2 MB


def test_a_folder_and_tar_shards_hold_the_same_pairs(tmp_path: Path) -> None:
    sources = shards.written(tmp_path, 5)
    found = {
        name: {
            (source.caption(index, 0.0), source[index]["image"].decode().tobytes())  # type: ignore[union-attr]
            for index in range(len(source))
        }
        for name, source in sources.items()
    }
    assert len(found["folder"]) == 5
    assert found["folder"] == found["shards"]


def test_pairs_a_second_are_measured_from_both() -> None:
    speeds = shards.measure(pictures=4, repetitions=1)
    assert speeds["ratio"] == pytest.approx(speeds["shards"] / speeds["folder"])

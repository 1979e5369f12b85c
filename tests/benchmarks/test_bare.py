"""The bare loop takes the same steps as the Trainer would, on images that never end."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.bare import BareLoop, RandomImageSource, RepeatViews
from src.datamodules.datamodule import IMAGENET_MEAN, IMAGENET_STD
from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.views.image import CenterCrop
from src.models.masked.mae import MAE
from src.models.teacher import TeacherPair
from src.optim import OptimizerRecipe
from tests.toys import small_vit


def mae() -> MAE:
    torch.manual_seed(0)
    vit = small_vit(img_size=32, embed_dim=32)
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, betas=(0.9, 0.95)), lr=0.01, weight_decay=0.05)
    return MAE(vit, recipe, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def test_bare_steps_are_plain_pytorch_steps() -> None:
    images = RandomImageSource("train", size=32, length=16).distinct_images
    ours, module = BareLoop(copy.deepcopy(mae()), images, batch_size=4, precision="32-true"), mae()
    torch.manual_seed(1)
    ours.run(3)

    optimizer = module.configure_optimizers()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.manual_seed(1)
    for step in range(3):
        index = torch.randint(16, (4,))
        image = (torch.from_numpy(images).float().div(255)[index] - mean) / std
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step / 100  # the warmup's line
        optimizer.zero_grad()
        module.training_step({"image": image, "label": index, "index": index}, step)["loss"].backward()
        optimizer.step()
    moved = 0.0
    for mine, reference, start in zip(ours.module.parameters(), module.parameters(), mae().parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)
        moved += float((mine - start).detach().abs().sum())
    assert moved > 0


def test_memory_source_repeats_its_pictures_under_all_indices() -> None:
    source = RandomImageSource("train", size=8, length=100_000, distinct=7, classes=3)
    dataset = ViewedDataset(source, CenterCrop(size=8, share=1.0), seed=0)
    batch = dataset[[SampleKey(0, 5), SampleKey(0, 5 + 7 * 1000), SampleKey(0, 6)]]
    assert len(dataset) == 100_000
    assert np.array_equal(batch["image"][0], source.distinct_images[5])
    assert torch.equal(batch["image"][0], batch["image"][1])
    assert not torch.equal(batch["image"][0], batch["image"][2])
    assert batch["label"][0] == batch["label"][1] == source[5]["label"]
    assert torch.equal(source[12]["image"], batch["image"][0])


def test_copies_are_the_picture_and_its_corner() -> None:
    source = RandomImageSource("train", size=8, length=3)
    batch = ViewedDataset(source, RepeatViews(2, 3, 4), seed=0)[[SampleKey(0, 2), SampleKey(0, 0)]]
    assert batch["views"].shape == (2, 2, 3, 8, 8)
    assert batch["local_views"].shape == (2, 3, 3, 4, 4)
    for view in range(2):
        assert np.array_equal(batch["views"][0, view], source.distinct_images[2])
    for view in range(3):
        assert np.array_equal(batch["local_views"][1, view], source.distinct_images[0][:, :4, :4])


def test_a_bare_step_clips_and_moves_the_teacher() -> None:
    """On a loss whose gradient is 4 everywhere, clipped to length 1, by SGD with rate 0 + teachers at 0.99."""

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Parameter(torch.full((4,), 2.0))
            self.teacher = nn.Linear(4, 1, bias=False).requires_grad_(False)
            self.follower = nn.Linear(4, 1, bias=False)
            nn.init.zeros_(self.teacher.weight)
            self.optimizer_recipe = OptimizerRecipe(torch.optim.SGD, lr=1.0)
            self.shapes: list[torch.Size] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer_recipe.build(self)

        def teacher_pairs(self) -> list[TeacherPair]:
            return [TeacherPair(self.follower, self.teacher)]

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
            self.shapes.append(batch["views"].shape)
            return {"loss": 4 * self.student.sum()}

    method = Method()
    images = RandomImageSource("train", size=8, length=4).distinct_images
    loop = BareLoop(method, images, batch_size=2, precision="32-true", repeat_views=RepeatViews(2), clip=1.0)  # type: ignore[arg-type]
    loop.run(2)  # the first at rate 0, the second at 1 / 100, of a warm-up of 100 steps
    torch.testing.assert_close(method.student.detach(), torch.full((4,), 2 - 0.01 * 0.5))  # length 1 over four axes
    torch.testing.assert_close(method.teacher.weight, (1 - 0.99**2) * method.follower.weight.detach())
    assert method.shapes == [(2, 2, 3, 8, 8)] * 2

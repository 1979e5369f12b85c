from __future__ import annotations

import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.pictures import Pictures
from src.datamodules.image import ImageDataModule
from src.datamodules.sources.source import Split
from src.datamodules.views.image import CentreCrop
from src.loggers import OrderedTensorBoardLogger
from src.models.backbones.image_encoder import ImageEncoder
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe
from tests.callbacks.small_runs import fit

SIDE = 6


class Colours:
    """Sixteen flat pictures; the green of validation picture i is 10 * i."""

    classes = ("a",)

    def __init__(self, split: Split) -> None:
        levels = torch.arange(16).mul(10).view(16, 1, 1, 1)
        self.images = levels.expand(16, 3, SIDE, SIDE).to(torch.uint8).clone()
        self.images[:, 0] = 255 if split == "val" else 0
        self.labels = np.zeros(16, np.int64)

    def __len__(self) -> int:
        return 16

    def name(self, index: int) -> str:
        return str(index)


class Method(PretrainModule):
    """Shows the picture and one with random pixels."""

    def __init__(self) -> None:
        super().__init__(OptimizerRecipe(partial(torch.optim.SGD), lr=0.1))
        self.layer = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()  # a mode of its own
        self.batches: list[dict[str, Tensor]] = []
        self.noise: list[Tensor] = []

    def encoders(self) -> dict[str, ImageEncoder]:
        return {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.layer(self.dropout(batch["image"].mean((2, 3)))).square().mean()}

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(batch)
        self.noise.append(torch.rand(4))
        image = batch["image"]
        return {"pair": torch.stack((image, torch.zeros_like(image)), dim=1)}


def data() -> ImageDataModule:
    return ImageDataModule(
        source=Colours,
        train_view=CentreCrop(SIDE, share=1),
        eval_view=CentreCrop(SIDE, share=1),
        batch_size=4,
        num_workers=0,
    )


def train(folder: Path, module: L.LightningModule, *extra: L.Callback, **options: Any) -> EventAccumulator:
    fit(folder, *extra, module=module, data=data(), loggers=[OrderedTensorBoardLogger(folder)], **options)
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_the_grid_shows_the_first_validation_pictures_in_their_own_colours(tmp_path: Path) -> None:
    events = train(tmp_path, Method(), Pictures(count=3))
    assert events.Tags()["images"] == ["pictures/pair"]
    shown = events.Images("pictures/pair")
    pixels = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
    padding = 2
    assert pixels.shape == (3 * (SIDE + padding) + padding, 2 * (SIDE + padding) + padding, 3)
    for row in range(3):
        top = padding + row * (SIDE + padding)
        picture = pixels[top : top + SIDE, padding : padding + SIDE]
        assert np.abs(picture.astype(int) - (255, 10 * row, 10 * row)).max() <= 1
        # zero is the mean colour once the normalisation is undone
        second = pixels[top : top + SIDE, SIDE + 2 * padding : 2 * (SIDE + padding)]
        assert np.abs(second.astype(int) - np.array([0.485, 0.456, 0.406]) * 255).max() <= 1
    assert pixels[:padding].max() == 0


def test_pictures_come_at_the_start_at_epochs_and_at_the_end_and_once_each(tmp_path: Path) -> None:
    module = Method()
    events = train(tmp_path, module, Pictures(every_n_epochs=2), max_epochs=5)
    assert [event.step for event in events.Images("pictures/pair")] == [0, 8, 16, 20]
    assert len(module.batches) == 4
    assert all(torch.equal(batch["image"], module.batches[0]["image"]) for batch in module.batches)
    assert all(torch.equal(noise, module.noise[0]) for noise in module.noise)  # the same masks every time


def test_a_resumed_run_does_not_show_its_start_again(tmp_path: Path) -> None:
    train(tmp_path, Method(), Pictures(), Checkpoints(tmp_path, every_minutes=None, monitor=None), max_epochs=1)
    events = train(tmp_path, Method(), Pictures(), max_epochs=2, resume=tmp_path / "last.ckpt")
    assert [event.step for event in events.Images("pictures/pair")] == [0, 4, 8]


def test_generators_and_modes_are_left_as_they_were(tmp_path: Path) -> None:
    class Around(L.Callback):
        states: list[Any] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            modes = [module.training for module in pl_module.modules()]
            self.states.append(
                (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), modes)
            )

    around = Around()
    module = Method()
    train(tmp_path, module, around, Pictures(), around, max_epochs=1)  # before and after the pictures
    first, second = around.states
    assert first == second
    assert first[3] == [True, True, False]


def test_a_method_without_pictures_is_not_asked_for_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Method):
        pictures = PretrainModule.pictures

    monkeypatch.setattr(ImageDataModule, "val_dataloader", lambda self: pytest.fail("a batch was made"))
    assert train(tmp_path, Plain(), Pictures(), max_epochs=1).Tags()["images"] == []

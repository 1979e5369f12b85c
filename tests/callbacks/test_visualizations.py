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
from src.callbacks.drawing import animation
from src.callbacks.visualizations import Visualizations
from src.datamodules.batches.image import MultiViewBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.views.color import Color
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.multi import Augmented, MultiView
from src.loggers import OrderedTensorBoardLogger
from src.models.backbones.encoder import Encoder
from src.models.joint_embedding.base import JointEmbedding
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe
from tests.callbacks.small_runs import fit

SIDE = 6


class Colors(Source):
    """Sixteen flat images; the green of validation image i is 10 * i."""

    classes = ("a",)

    def __init__(self, split: Split) -> None:
        levels = torch.arange(16).mul(10).view(16, 1, 1, 1)
        self.images = levels.expand(16, 3, SIDE, SIDE).to(torch.uint8).clone()
        self.images[:, 0] = 255 if split == "val" else 0
        self.labels = np.zeros(16, np.int64)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, self.images[index])

    def name(self, index: int) -> str:
        return str(index)


class Method(PretrainModule):
    """Visualizes the image beside the mean color."""

    def __init__(self) -> None:
        super().__init__(OptimizerRecipe(partial(torch.optim.SGD), lr=0.1))
        self.layer = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()  # unlike the other modules
        self.batches: list[dict[str, Tensor]] = []
        self.noise: list[Tensor] = []

    def encoders(self) -> dict[str, Encoder]:
        return {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.layer(self.dropout(batch["image"].mean((2, 3)))).square().mean()}

    def visualize(self, batch: Any) -> dict[str, Tensor]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(batch)
        self.noise.append(torch.rand(4))
        image = batch["image"]
        return {"pair": torch.stack((image, torch.zeros_like(image)), dim=1)}


def data() -> DataModule:
    return DataModule(
        source=Colors,
        train_view=CenterCrop(SIDE, share=1),
        eval_view=CenterCrop(SIDE, share=1),
        batch_size=4,
        num_workers=0,
    )


def train(folder: Path, module: L.LightningModule, *extra: L.Callback, **options: Any) -> EventAccumulator:
    fit(folder, *extra, module=module, data=data(), loggers=[OrderedTensorBoardLogger(folder)], **options)
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_the_grid_shows_the_first_validation_images_denormalized(tmp_path: Path) -> None:
    events = train(tmp_path, Method(), Visualizations(count=3))
    assert events.Tags()["images"] == ["images/pair"]
    shown = events.Images("images/pair")
    pixels = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
    padding = 2
    assert pixels.shape == (3 * (SIDE + padding) + padding, 2 * (SIDE + padding) + padding, 3)
    for row in range(3):
        top = padding + row * (SIDE + padding)
        image = pixels[top : top + SIDE, padding : padding + SIDE]
        assert np.abs(image.astype(int) - (255, 10 * row, 10 * row)).max() <= 1
        # zero is the mean color before normalization
        second = pixels[top : top + SIDE, SIDE + 2 * padding : 2 * (SIDE + padding)]
        assert np.abs(second.astype(int) - np.array([0.485, 0.456, 0.406]) * 255).max() <= 1
    assert pixels[:padding].max() == 0


class Moving(Method):
    """Visualizes clips of an image that becomes brighter, beside a constant mean color."""

    visualize = PretrainModule.visualize

    def visualize_video(self, batch: Any) -> dict[str, Tensor]:
        image = batch["image"]
        frames = torch.stack([image + 0.1 * time for time in range(4)], dim=1)
        return {"pair": torch.stack([frames, torch.zeros_like(frames)], dim=1)}


class Timed(DataModule):
    """The first video has a frame every 0.12 s, the others one every second."""

    def seconds_per_frame(self, index: int) -> float:
        return 0.12 if index == 0 else 1.0


def test_clips_play_side_by_side_denormalized_at_the_frame_rate(tmp_path: Path) -> None:
    view = CenterCrop(SIDE, share=1)
    module, timed = Moving(), Timed(source=Colors, train_view=view, eval_view=view, batch_size=4, num_workers=0)
    loggers = [OrderedTensorBoardLogger(tmp_path)]
    fit(tmp_path, Visualizations(count=2), module=module, data=timed, loggers=loggers, max_epochs=1)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["clips/pair"]
    shown = events.Images("clips/pair")
    assert [event.step for event in shown] == [0, 4]
    padding, film = 2, Image.open(io.BytesIO(shown[0].encoded_image_string))
    assert (film.format, film.n_frames, film.info["loop"]) == ("GIF", 4, 0)
    assert (shown[0].width, shown[0].height) == film.size == (2 * (SIDE + padding) + padding,) * 2
    std = np.array([0.229, 0.224, 0.225]) * 255
    for time in range(4):
        film.seek(time)
        assert film.info["duration"] == 120  # milliseconds
        pixels = np.asarray(film.convert("RGB")).astype(int)
        for row in range(2):
            top = padding + row * (SIDE + padding)
            expected = np.clip(np.array([255, 10 * row, 10 * row]) + 0.1 * time * std, 0, 255)
            assert np.abs(pixels[top : top + SIDE, padding : padding + SIDE] - expected).max() <= 0.51
            beside = pixels[top : top + SIDE, SIDE + 2 * padding : 2 * (SIDE + padding)]
            assert np.abs(beside - np.array([0.485, 0.456, 0.406]) * 255).max() <= 0.51
        assert pixels[:padding].max() == 0


def test_equal_frames_are_merged_and_none_is_shorter_than_20_milliseconds() -> None:
    red, blue = (Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255)))
    film = Image.open(io.BytesIO(animation([red, red, blue], seconds=0.001)))
    durations = []
    for number in range(film.n_frames):
        film.seek(number)
        durations.append(film.info["duration"])
    assert durations == [40, 20]


def test_images_are_logged_at_the_start_at_epochs_and_at_the_end_once_a_step(tmp_path: Path) -> None:
    module = Method()
    events = train(tmp_path, module, Visualizations(every_n_epochs=2), max_epochs=5)
    assert [event.step for event in events.Images("images/pair")] == [0, 8, 16, 20]
    assert len(module.batches) == 4
    assert all(torch.equal(batch["image"], module.batches[0]["image"]) for batch in module.batches)
    assert all(torch.equal(noise, module.noise[0]) for noise in module.noise)  # the seed is the same every time


def test_a_resumed_run_does_not_log_its_start_again(tmp_path: Path) -> None:
    train(tmp_path, Method(), Visualizations(), Checkpoints(tmp_path, every_minutes=None, monitor=None), max_epochs=1)
    events = train(tmp_path, Method(), Visualizations(), max_epochs=2, resume=tmp_path / "last.ckpt")
    # both event files may be of the same second, which leaves their order open
    assert sorted(event.step for event in events.Images("images/pair")) == [0, 4, 8]


def test_generators_and_modes_are_restored(tmp_path: Path) -> None:
    class Around(L.Callback):
        states: list[Any] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            modes = [module.training for module in pl_module.modules()]
            self.states.append(
                (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), modes)
            )

    around = Around()
    module = Method()
    train(tmp_path, module, around, Visualizations(), around, max_epochs=1)  # before and after the images
    first, second = around.states
    assert first == second
    assert first[3] == [True, True, False]


def test_a_method_without_visualizations_needs_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Method):
        visualize = PretrainModule.visualize

    monkeypatch.setattr(DataModule, "val_dataloader", lambda self: pytest.fail("a batch was loaded"))
    assert train(tmp_path, Plain(), Visualizations(), max_epochs=1).Tags()["images"] == []


class Comparison(JointEmbedding):
    """Takes two views and visualizes them."""

    def __init__(self) -> None:
        super().__init__(OptimizerRecipe(partial(torch.optim.SGD), lr=0.1))
        self.layer = nn.Linear(3, 1)
        self.shown: list[Tensor] = []

    def encoders(self) -> dict[str, Encoder]:
        return {}

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        return {"loss": self.layer(batch["views"].mean((1, 3, 4))).square().mean()}

    def visualize(self, batch: MultiViewBatch) -> Any:
        self.shown.append(batch["views"])
        return super().visualize(batch)


def test_a_multi_view_method_gets_training_views_of_validation_images(tmp_path: Path) -> None:
    """The training split has no red, the validation split is all red."""
    view = MultiView({"both": Augmented(RandomResizedCrop(SIDE), Color(brightness=0.5, jitter=1.0), count=2)})
    views = DataModule(source=Colors, train_view=view, eval_view=CenterCrop(SIDE, share=1), batch_size=4, num_workers=0)
    module = Comparison()
    fit(tmp_path, Visualizations(count=3), module=module, data=views, max_epochs=2)
    assert len(module.shown) >= 2
    first, *later = module.shown
    assert all(torch.equal(first, other) for other in later)
    shown = views.denormalize(first)
    assert shown.shape == (3, 2, 3, SIDE, SIDE)
    red, green = shown[:, :, 0, 0, 0], shown[:, :, 1, 0, 0]
    assert (red >= 0.5 - 1e-6).all()
    assert red.unique().numel() > 2  # the views differ in brightness
    # before the brightness changes, green is 10 * i of 255; white is clipped
    dark = red < 1 - 1e-6
    expected = torch.tensor([0.0, 10.0, 20.0])[:, None].expand(3, 2) / 255 * red
    assert torch.allclose(green[dark], expected[dark], atol=0.003)

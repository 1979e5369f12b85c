"""STS: regression of motion and appearance statistics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from src.datamodules.datamodule import DataModule
from src.datamodules.scenes.films import FilmsSource
from src.datamodules.sources.video_folder import VideoFolderSource
from src.datamodules.views.statistics import StatisticsCrop
from src.datamodules.views.video import CenterVideoCrop, DenseClip, RandomSquare
from src.errors import SettingError
from src.models.backbones.video_conv import r2plus1d
from src.models.video.sts import STS
from src.optim import OptimizerRecipe, sgd

CLIP = DenseClip(frames=4, stride=2)


def method(**options: float) -> STS:
    torch.manual_seed(0)
    return STS(r2plus1d(layers=(1, 1, 1, 1), width=8), OptimizerRecipe(sgd, lr=1e-3), **options)


def data(source: object, **options: object) -> DataModule:
    return DataModule(
        source=source,
        train_view=StatisticsCrop(CLIP, RandomSquare(16)),
        eval_view=CenterVideoCrop(CLIP, size=16),
        batch_size=8,
        num_workers=0,
        **options,
    )


def test_the_loss_is_the_weighted_sum_of_two_errors() -> None:
    module = method().eval()
    batch = {
        "video": torch.randn(2, 4, 3, 16, 16),
        "motion": torch.randint(0, 17, (2, 14)).float(),
        "appearance": torch.randint(1, 17, (2, 13)).float(),
    }
    embedding = module.backbone.forward_features(batch["video"]).mean(dim=(2, 3, 4)).double()
    errors = []
    for name, head in (("motion", module.motion), ("appearance", module.appearance)):
        prediction = embedding @ head.weight.double().T + head.bias.double()
        errors.append((prediction - batch[name].double()).pow(2).sum() / batch[name].numel())
    out = module.training_step(batch, 0)  # type: ignore[arg-type]
    torch.testing.assert_close(out["loss"].double(), errors[0] + 0.1 * errors[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(out["logs"]["appearance"].double(), errors[1], rtol=1e-5, atol=0)
    assert out["embedding"].shape == (2, 64)
    assert not out["embedding"].requires_grad
    alone = method(motion_weight=0.0).eval().training_step(batch, 0)["loss"]  # type: ignore[arg-type]
    torch.testing.assert_close(alone.double(), 0.1 * errors[1], rtol=1e-5, atol=0)


def test_it_learns_the_statistics_of_a_few_films() -> None:
    films = data(partial(FilmsSource, count=8, resolution=16, duration=1.0, rate=8.0))
    batch = films.on_after_batch_transfer(next(iter(films.train_dataloader())), 0)
    module = method()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = module.training_step(batch, step)["loss"]  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    variance = float(batch["motion"].var(dim=0, unbiased=False).mean())
    assert losses[-1] < 0.2 * variance < losses[0]  # far better than predicting the means


def test_videos_without_flow_raise_and_name_data_with_flow(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for number in range(12):
        (tmp_path / "run" / f"{number}.mp4").touch()
    message = (
        r"data\.train_view: StatisticsCrop needs the optical flow .* VideoFolderSource does not have: .*data=films"
    )
    with pytest.raises(SettingError, match=message):
        data(partial(VideoFolderSource, root=tmp_path, val_share=0.3)).train_dataloader()
    data(partial(FilmsSource, count=8, resolution=16)).train_dataloader()

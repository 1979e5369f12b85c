"""The recipes of the family as they are composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from src import configuration, train
from src.configuration import UserError
from src.datamodules.batch import ImageBatch, MultiViewBatch
from src.models.losses.contrastive import dcl, dclw, nt_xent


def composed(*words: str) -> Any:
    return train.compose(words)


@pytest.mark.parametrize(
    ("views", "counts", "solarise"),
    [
        ("simclr", (2, 0), 0.0),
        ("moco", (2, 0), 0.0),
        ("byol", (2, 0), 0.2),
        ("swav", (2, 6), 0.0),
        ("dino", (2, 8), 0.2),
    ],
)
def test_the_papers_views_are_there_by_name(views, counts, solarise):
    config = composed("experiment=simclr_r50", "scale=paper", f"views@data.train_view={views}")
    view = configuration.instantiate(config.data.train_view)
    assert view.batch_type is MultiViewBatch
    kinds = [*view.views.values()], [*(view.local_views or {}).values()]
    assert tuple(sum(kind.count for kind in group) for group in kinds) == counts
    assert {kind.crop.size for kind in kinds[0]} == {224}
    assert {kind.crop.size for kind in kinds[1]} <= {96}
    assert max(kind.colour.solarise for group in kinds for kind in group) == solarise


@pytest.mark.parametrize(
    ("experiment", "loss", "batch", "rate"),
    [("simclr_r50", nt_xent, 4096, 4.8), ("dcl_r50", dcl, 256, 1.2), ("dclw_r50", dclw, 256, 1.2)],
)
def test_the_decoupled_losses_are_simclr_with_another_loss(experiment, loss, batch, rate):
    config = composed(f"experiment={experiment}", "scale=paper")
    assert configuration.instantiate(config.model.loss) is loss
    assert config.data.batch_size == batch
    assert config.optimizer.lr == pytest.approx(rate)
    assert config.trainer.sync_batchnorm


@pytest.mark.parametrize("experiment", ["simclr_r50", "byol_r50", "supervised_r50", "supervised_vits"])
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_at_the_tiny_scale_every_method_takes_either_backbone(experiment, backbone):
    config = composed(f"experiment={experiment}", "scale=tiny", f"backbone={backbone}")
    module = configuration.instantiate(config.model)
    encoder = next(iter(module.encoders().values()))
    assert encoder.dim == {"vit": 128, "resnet": 256}[backbone]
    assert encoder(torch.zeros(1, 3, 64, 64)).embedding.shape == (1, encoder.dim)
    assert config.data.train_view._target_.startswith("src.datamodules.views.multi.")
    kind = configuration.instantiate(config.data.train_view).batch_type
    assert kind is (ImageBatch if experiment.startswith("supervised") else MultiViewBatch)


def test_a_momentum_outside_of_0_and_1_ends_the_command_with_its_key(tmp_path: Path):
    words = [
        "experiment=byol_r50",
        "scale=tiny",
        "backbone=vit",
        "model.teacher_momentum=1.5",
        f"paths.runs={tmp_path}",
    ]
    small = ["data.source.count={train: 8, val: 4, test: 4}", "data.source.cache_dir=null", "data.batch_size=4"]
    with pytest.raises(UserError, match=r"model\.teacher_momentum.*must lie in \[0, 1\]; got 1.5"):
        train.main([*words, *small, "data.num_workers=0", "data.train_samples=null", "data.eval_samples=null"])


def test_views_that_do_not_suit_the_method_end_the_command_with_their_key(tmp_path: Path):
    words = ["experiment=simclr_r50", "scale=tiny", "views@data.train_view=swav", f"paths.runs={tmp_path}"]
    small = ["data.source.count={train: 8, val: 4, test: 4}", "data.source.cache_dir=null", "data.batch_size=4"]
    quiet = ["callbacks.pictures=null", "data.train_view.local_views.small.crop.size=32", "data.num_workers=0"]
    with pytest.raises(
        UserError, match=r"data\.train_view: .* 2 in train_view\.views and 6 in train_view\.local_views"
    ):
        train.main([*words, *small, *quiet, "data.train_samples=null", "data.eval_samples=null"])


def test_ibot_is_dino_with_its_own_views_and_masks():
    config = composed("experiment=ibot_vits", "scale=paper")
    views = config.data.train_view
    assert (views.local_views.local.count, views.local_views.local.crop.scale) == (10, [0.05, 0.25])
    assert [kind.crop.scale for kind in views.views.values()] == [[0.25, 1.0]] * 2
    assert [kind.colour.blur for kind in views.views.values()] == [1.0, 0.1]  # DINO's colours
    assert config.optimizer.lr == pytest.approx(2e-3)
    assert config.schedules.optimizer.weight_decay.end == 0.4
    assert config.callbacks.gradient_clip.max_norm == 3.0
    assert config.schedules.patch_teacher_temperature.end == 0.07


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_dino_takes_local_views_with_either_backbone(backbone):
    config = composed("experiment=dino_r50", "scale=tiny", f"backbone={backbone}")
    module = configuration.instantiate(config.model)
    batch = {"views": torch.zeros(2, 2, 3, 64, 64), "local_views": torch.zeros(2, 4, 3, 32, 32)}
    assert module.training_step(batch, 0)["embedding"].shape == (2, {"vit": 128, "resnet": 256}[backbone])
    assert config.optimizer.algorithm == {"_target_": "torch.optim.AdamW", "_partial_": True}
    paper = composed("experiment=dino_r50", "scale=paper")
    optimizer = configuration.instantiate(paper.optimizer).build(torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert paper.schedules.optimizer.weight_decay.end == 1e-4
